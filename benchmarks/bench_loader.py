"""Pictures a second for each core: `records_feed` in turns with torch's DataLoader and with `datasets`.

All three shuffle 600 JPEGs of 500 x 375 pixels, decode them, resize them to 224 by the same Pillow calls
(`decode_square`), draw a caption for each and tokenize a batch of 16. On one core each side works in its own process,
pinned to that core; on two it has two worker processes, where `datasets`, which has none, is read through torch's
DataLoader, as its manual says, and ours is also measured with threads in place of workers (`threads`). Before a timed
stretch each side uses up the batches that it has made ahead. The comparison is the median, over the rounds, of the
ratio of the two rates in a round, with a 95% bootstrap interval: the rate of a shared machine changes by a third within
minutes. Then it prints the share of its time that a training step of ViT-B/32 and BERT-base, on the CPU, waits for its
batch; `--wait` prints only that.

    python benchmarks/bench_loader.py [--rounds 15] [--wait] [--out build/bench/loader.json]
"""

import argparse
import io
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import turns
from PIL import Image, ImageDraw, ImageFilter

from clipid_utils.data.batches.loader import records_feed
from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.paths import CHECKPOINTS
from clipid_utils.pictures import decode_square

FOLDER = Path("build/bench/pictures")
COUNT, SIZE, BATCH, LENGTH = 600, (500, 375), 16, 32
MADE_AHEAD, TIMED = 24, 64  # batches
CORES = {"1 core": 0, "2 cores": 2}  # worker processes
CAPTIONS = ["seekor kucing tidur di atas kursi", "dua orang anak bermain bola di lapangan dekat rumah"]


def photograph(seed: int) -> bytes:
    """A JPEG file as large as a photograph's: clouds of all sizes, a few sharp things before them, and grain."""
    rng = np.random.default_rng(seed)
    clouds = np.full((SIZE[1], SIZE[0], 3), 128.0)
    for octave in range(1, 7):
        small = Image.fromarray(rng.integers(0, 256, (3 * 2**octave, 4 * 2**octave, 3), np.uint8))
        clouds += (np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), float) - 128) * 1.1 / 1.6**octave
    picture = Image.fromarray(clouds.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for x, y, width, height, colour in rng.integers((0, 0, 20, 20, 0), (*SIZE, 180, 140, 1 << 24), (12, 5)):
        draw.ellipse((x, y, x + width, y + height), fill=f"#{colour:06x}")
    picture = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), float) + rng.normal(0, 6, (*SIZE[::-1], 1))
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def prepare():
    """The captions records of the pictures, which are made where they are not there yet."""
    listing = FOLDER / "captions.jsonl"
    if not listing.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        for number in range(COUNT):
            (FOLDER / f"{number}.jpg").write_bytes(photograph(number))
        write_captions(({"image_path": f"{number}.jpg", "captions": CAPTIONS} for number in range(COUNT)), listing)
    return read_captions(listing)


def ours(workers: int) -> Iterator:
    feed = records_feed(prepare(), CLIPProcessor.load(CHECKPOINTS / "mini").tokenize, 224, BATCH, seed=0, length=LENGTH,
                        workers=workers)
    return iter(feed.dataset)


def threads(workers: int) -> Iterator:
    return ours(0)


def example(record: dict) -> dict:
    """The batch row that the other libraries make of a record."""
    number = np.random.randint(len(record["captions"]))
    return {"images": decode_square(record["image_path"], 224), "captions": record["captions"][number]}


class Collate:
    def __init__(self):
        self.tokenize = CLIPProcessor.load(CHECKPOINTS / "mini").tokenize

    def __call__(self, examples: list[dict]) -> dict:
        import torch

        texts = self.tokenize([row["captions"] for row in examples], LENGTH)
        images = torch.utils.data.default_collate([row["images"] for row in examples])
        return {"images": images, **{name: torch.from_numpy(array) for name, array in texts.items()}}


class Pictures:
    """A dataset as torch's manual has it: a list of rows, opened when asked for."""

    def __init__(self):
        records = prepare()
        self.rows = [{"image_path": path, "captions": CAPTIONS} for path in records["image_path"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        return example(self.rows[row])


def through_torch(dataset, workers: int) -> Iterator:
    from torch.utils.data import DataLoader, RandomSampler

    endless = RandomSampler(dataset, replacement=True, num_samples=10**7)  # no pause between epochs
    return iter(DataLoader(dataset, BATCH, sampler=endless, num_workers=workers, collate_fn=Collate()))


def torch_side(workers: int) -> Iterator:
    return through_torch(Pictures(), workers)


def datasets_side(workers: int) -> Iterator:
    def transform(columns: dict) -> dict:
        rows = [example(dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]
        return {key: [row[key] for row in rows] for key in rows[0]}

    records = prepare().select_columns(["image_path", "captions"]).with_transform(transform)
    if workers:
        return through_torch(records, workers)
    tokenize = CLIPProcessor.load(CHECKPOINTS / "mini").tokenize
    epochs = (records.shuffle(seed=epoch).iter(BATCH, drop_last_batch=True) for epoch in itertools.count())
    return ({"images": np.stack(batch["images"]), **tokenize(batch["captions"], LENGTH)}
            for batch in itertools.chain.from_iterable(epochs))


SIDES = {"ours": ours, "threads": threads, "torch": torch_side, "datasets": datasets_side}


def worker(side: str, cores: str) -> None:
    """Answers each line on standard input with the seconds of a stretch of batches, as turns.worker does."""
    if cores == "1 core":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batches = SIDES[side](CORES[cores])
    assert next(batches)["images"].shape == (BATCH, 224, 224, 3)
    print("ready", flush=True)
    for _ in sys.stdin:
        for _ in range(MADE_AHEAD):
            next(batches)
        start = time.perf_counter()
        for _ in range(TIMED):
            next(batches)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"seconds": time.perf_counter() - start, "peak_mib": round(peak)}), flush=True)


def waiting(workers: int, steps: int = 12) -> dict[str, float]:
    """The share of the time that training waits, and its seconds a step, after the batches made ahead are used up."""
    import bench_step
    import jax

    step, batches, waited = bench_step.ours("jit_form", "vit_b32_bert_base"), ours(workers), 0.0
    for number in range(2 + steps):
        if number == 2:  # compiled by now
            start, waited = time.perf_counter(), 0.0
        before = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - before
        jax.device_put(batch["images"])
        step()
    elapsed = time.perf_counter() - start
    batches.close()
    return {"data_wait_fraction": round(waited / elapsed, 4), "seconds_a_step": round(elapsed / steps, 3)}


def by(rates: list[float], others: list[float]) -> dict[str, float]:
    """The median ratio of two sides' rates, round by round, and the ends of its interval."""
    ratios = np.divide(rates, others)
    medians = np.median(np.random.default_rng(0).choice(ratios, (10_000, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975)).round(3).tolist()
    return {"median": round(float(np.median(ratios)), 3), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "CORES"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--wait", action="store_true", help="only how long a training step waits")
    parser.add_argument("--out", type=Path, default=Path("build/bench/loader.json"))
    options = parser.parse_args()
    if options.worker:
        return worker(*options.worker)
    prepare()
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    for cores in {} if options.wait else CORES:
        sides = tuple(SIDES) if CORES[cores] else ("ours", "torch", "datasets")  # on one core ours are threads
        report[cores] = found = turns.compare(__file__, cores, TIMED * BATCH, options.rounds, sides)
        del found["ratio"]
        print(f"{cores}: pictures/s per core " + "".join(f"{side:>10} {rate / int(cores[0]):.1f}"
                                                         for side, rate in found["median"].items()), flush=True)
        for side, other in itertools.product(sides[:-2], sides[-2:]):
            ratio = by(found[side]["examples_per_second"], found[other]["examples_per_second"])
            found[f"{side} by {other}"] = ratio
            print(f"  {side} by {other}: {ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]", flush=True)
    for workers in (0, 1, 2):
        report[f"wait, {workers} workers"] = found = waiting(workers)
        print(f"{workers} workers: {found['data_wait_fraction']:.2%} of {found['seconds_a_step']} s a step waited")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

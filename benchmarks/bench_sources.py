"""Readers of caption files: rows a second and peak memory at 10 thousand and at 1 million rows; and near copies.

    python benchmarks/bench_sources.py [--rows 10000 1000000] [--copies 10000 1000000] [--out build/bench/sources.json]

Each reader reads a file made for it, in the published format, in a process of its own, which keeps no record.
Seconds are of that process on a processor, so that a busy machine slows it little. Peak memory is its largest resident
set, in all and beyond what it was after the imports. The last table is the search for near copies of 2,000 pictures
among many (`copy_search`), random but as unevenly spread as photographs are, beside comparing the hashes alone of each
with all (faiss IndexBinaryFlat, which needs the thumbnails after that), both on one core.
"""

import argparse
import csv
import gzip
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

FOLDER = Path("build/bench/sources")
WORDS = "seekor sebuah seorang kucing anjing kuda merah biru besar kecil duduk tidur di atas meja dekat jendela".split()
WIT = ("language", "page_url", "image_url", "page_title", "caption_reference_description", "mime_type",
       "context_page_description", "context_section_description")
QUERIES = 2000
READ = """
import json, sys, time
from pathlib import Path
from clipid_utils.data.report import Report
from clipid_utils.data import coco, conceptual, flickr, vizwiz, wit
folder, kind, report = Path(sys.argv[1]), sys.argv[2], Report()
path = folder / kind
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
before, start = peak(), time.process_time()
rows = {
    "cc12m.tsv": lambda: conceptual.read_conceptual(path, report, source="cc12m"),
    "coco.tsv": lambda: coco.read_coco(path, folder, report),
    "coco.json": lambda: coco.read_coco(path, folder, report),
    "flickr8k.json": lambda: flickr.read_flickr(path, folder, report, source="flickr8k"),
    "vizwiz.json": lambda: vizwiz.read_vizwiz(path, folder, report),
    "xflickrco.jsonl": lambda: flickr.read_xflickrco(path, folder, report),
    "wit.tsv.gz": lambda: wit.read_wit([path], report),
}[kind]()
records = sum(1 for _ in rows)
print(json.dumps({"seconds": time.process_time() - start, "peak_mib": peak(), "beyond_imports_mib": peak() - before,
                  "records": records, "kept": report.kept}))
"""


def captions(count: int) -> Iterator[str]:
    """Sentences of ten words, of which one in a hundred is empty."""
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        for numbers in rng.integers(0, len(WORDS), (min(10_000, count - start), 10)):
            yield "" if numbers[0] == numbers[1] == 0 else " ".join(WORDS[number] for number in numbers)


def write_cc12m(path: Path, count: int) -> None:
    with open(path, "w") as file:
        file.write("caption\turl\n")
        file.writelines(f"{caption}\thttps://example.org/pictures/{number:09d}/photo.jpg\n"
                        for number, caption in enumerate(captions(count)))


def write_coco(path: Path, count: int) -> None:
    """Five captions a picture, far apart, as COCO's are; one picture in two hundred is there."""
    pictures = count // 5
    for number in range(0, pictures, 200):
        (path.parent / f"{number:012d}.jpg").touch()
    with open(path, "w") as file:
        file.write("caption\timage_name\n")
        file.writelines(f"{caption}\t{number * 7919 % pictures:012d}.jpg\n"
                        for number, caption in enumerate(captions(count)))


def write_coco_json(path: Path, count: int) -> None:
    """The same as annotations; its pictures are those of `write_coco`."""
    pictures = count // 5
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(pictures)]
    rows = [{"id": number, "image_id": number * 7919 % pictures, "caption": caption}
            for number, caption in enumerate(captions(count))]
    path.write_text(json.dumps({"images": images, "annotations": rows}))


def write_flickr8k_json(path: Path, count: int) -> None:
    """Five captions a picture between their marks, as an object of lists, one line."""
    texts = captions(count)
    with open(path, "w") as file:
        for number in range(count // 5):
            marked = [f"<start> {caption} <end>" for caption in itertools.islice(texts, 5)]
            file.write(f'{", " if number else "{"}"{number:012d}.jpg": {json.dumps(marked)}')
        file.write("}")


def write_vizwiz_json(path: Path, count: int) -> None:
    """The same as a list of objects."""
    texts = captions(count)
    with open(path, "w") as file:
        for number in range(count // 5):
            row = {"image_path": f"{number:012d}.jpg", "captions": list(itertools.islice(texts, 5))}
            file.write(f'{", " if number else "["}{json.dumps(row)}')
        file.write("]")


def write_xflickrco(path: Path, count: int) -> None:
    with open(path, "w") as file:  # some of COCO's pictures, above
        file.writelines(json.dumps({"sentences": [caption], "id": number, "img_path": f"{number:012d}.jpg"}) + "\n"
                        for number, caption in enumerate(captions(count)))


def write_wit(path: Path, count: int) -> None:
    """Every second row in Indonesian, every tenth picture on two pages; contexts of several quoted lines."""
    with gzip.open(path, "wt", compresslevel=1, newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(WIT)
        for number, caption in enumerate(captions(count)):
            picture = number - 10 if number % 10 == 0 else number
            context = f'{caption} "{number}"\n\n{caption}. ' * 4
            table.writerow(("id" if number % 2 == 0 else "en", f"https://id.wikipedia.org/wiki/{number}",
                            f"https://upload.wikimedia.org/wikipedia/commons/{picture:09d}.jpg", f"Judul {number}",
                            caption, "image/jpeg", context, context))


WRITERS = {
    "cc12m.tsv": write_cc12m, "coco.tsv": write_coco, "coco.json": write_coco_json,
    "flickr8k.json": write_flickr8k_json, "vizwiz.json": write_vizwiz_json, "xflickrco.jsonl": write_xflickrco,
    "wit.tsv.gz": write_wit,
}


def read(kind: str, count: int) -> dict:
    folder = FOLDER / str(count)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / kind).exists():
        WRITERS[kind](part := folder / f"part-{kind}", count)
        part.rename(folder / kind)
    done = subprocess.run([sys.executable, "-c", READ, str(folder), kind], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def find_copies(count: int) -> dict:
    """Seconds to put the pictures into cells and to ask for the near copies of QUERIES of them, a third planted."""
    import faiss

    from clipid_utils.data.copy_search import KEYS, CopySearch, cells
    from clipid_utils.data.near_copies import MAX_BITS

    rng = np.random.default_rng(0)
    spread = ((1, 1, 1, 45), (1, 1, 3, 15), (2, 2, 1, 25), (4, 4, 1, 20), (4, 4, 3, 6))  # light, tint, large and small
    blocks = np.full((count, 4, 4, 3), 120, np.float32)
    for height, width, channels, size in spread:
        noise = rng.normal(0, size, (count, height, width, channels)).astype(np.float32)
        blocks += noise.repeat(4 // height, 1).repeat(4 // width, 2)
    blocks = blocks.clip(0, 255).astype(np.uint8)
    keys, planted = np.zeros(count, KEYS), rng.choice(count, 2 * (QUERIES // 3), replace=False)
    keys["hash"] = rng.integers(0, 2**64, count, np.uint64)
    one, other = planted.reshape(2, -1)
    blocks[other], keys["hash"][other] = blocks[one], keys["hash"][one] ^ np.uint64(0b10110)

    def thumbnails(rows: np.ndarray) -> np.ndarray:  # not kept: 3 GB for a million
        return blocks[rows].repeat(8, 1).repeat(8, 2)

    for start in range(0, count, 10_000):
        rows = np.arange(start, min(count, start + 10_000))
        keys["cell"][rows] = cells(thumbnails(rows))
    queries = np.concatenate([one, rng.choice(count, QUERIES - len(one), replace=False)])
    start = time.process_time()
    search = CopySearch(keys, thumbnails, np.arange(count))
    built, start = time.process_time() - start, time.process_time()
    found = {row for row, _ in search.copies(queries)}
    asked = time.process_time() - start
    assert found >= set(one.tolist())
    hashes = np.ascontiguousarray(keys["hash"]).view(np.uint8).reshape(count, 8)
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexBinaryFlat(64)
    flat.add(hashes)
    start = time.process_time()
    flat.range_search(hashes[queries], MAX_BITS + 1)
    return {"build_seconds": built, "seconds": asked, "all_with_all_seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--copies", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--out", type=Path, default=Path("build/bench/sources.json"))
    options = parser.parse_args()
    report = {"readers": {}, "copies": {}}
    print(f"{'file':18}{'rows':>11}{'rows/s':>11}{'peak MiB':>10}{'beyond imports':>16}{'records':>11}")
    for kind in WRITERS:
        for count in options.rows:
            report["readers"][f"{kind}, {count} rows"] = found = read(kind, count)
            print(f"{kind:18}{count:11,}{count / found['seconds']:11,.0f}{found['peak_mib']:10.1f}"
                  f"{found['beyond_imports_mib']:16.1f}{found['records']:11,}", flush=True)
    print(f"\n{'pictures':>10}{'into cells, s':>15}{'ms a query':>12}{'all with all, ms':>18}")
    for count in options.copies:
        report["copies"][str(count)] = found = find_copies(count)
        print(f"{count:10,}{found['build_seconds']:15.2f}{1000 * found['seconds'] / QUERIES:12.3f}"
              f"{1000 * found['all_with_all_seconds'] / QUERIES:18.3f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

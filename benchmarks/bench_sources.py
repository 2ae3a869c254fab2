"""Readers of caption files: rows a second and peak memory at 10 thousand and at 1 million rows; and near copies.

    python benchmarks/bench_sources.py [--rows 10000 1000000] [--copies 10000 1000000] [--out build/bench/sources.json]

Each reader has its own process and reads files in the published format, which are made for it and then deleted: a
million samples in tars take 3 GB. A row is a caption; for CC12M's tars it is a sample, for Unsplash a row of either
table. Seconds are processor seconds of that process, which a busy machine changes little. Peak memory is its largest
resident set, in total and beyond the imports.

The last table is the search for near copies of 2,000 pictures among many (`NearIndex`). The pictures are random and
as unevenly spread as photographs. Its peer compares the hashes of each with all (faiss IndexBinaryFlat, which then
still needs the thumbnails); both use one core.
"""

import argparse
import csv
import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from clipid_utils.data.sources.coco import UNWANTED
from clipid_utils.data.sources.conceptual import SBU_FILES

FOLDER = Path("build/bench/sources")
WORDS = "seekor sebuah seorang kucing anjing kuda merah biru besar kecil duduk tidur di atas meja dekat jendela".split()
WIT = ("language", "page_url", "image_url", "page_title", "caption_reference_description", "mime_type",
       "context_page_description", "context_section_description")
ADDRESS = "https://example.org/pictures/{:09d}/photo.jpg"
HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
PHOTOS = ("photo_id", "photo_url", "photo_image_url", "photo_submitted_at", "photo_featured", "photo_width",
          "photo_height", "photo_aspect_ratio", "photo_description", "photographer_username", "photographer_first_name",
          "photographer_last_name", "exif_camera_make", "exif_camera_model", "exif_iso", "exif_aperture_value",
          "exif_focal_length", "exif_exposure_time", "photo_location_name", "photo_location_latitude",
          "photo_location_longitude", "photo_location_country", "photo_location_city", "stats_views", "stats_downloads",
          "ai_description", "ai_primary_landmark_name", "ai_primary_landmark_latitude",
          "ai_primary_landmark_longitude", "ai_primary_landmark_confidence", "blur_hash")
KEYWORDS = ("photo_id", "keyword", "ai_service_1_confidence", "ai_service_2_confidence", "suggested_by_user")
LANGUAGES = ("ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk "
             "vi zh").split()
QUERIES = 2000
READ = """
import json, sys, time
from pathlib import Path
from clipid_utils.data.report import Report
from clipid_utils.data.sources import coco, conceptual, flickr, tables, unsplash, wit
from clipid_utils.data.sources.disk_table import OnDisk
folder, kind, report = Path(sys.argv[1]), sys.argv[2], Report()
path = folder / kind
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
before, start = peak(), time.process_time()
rows = {
    "cc12m.tsv": lambda: conceptual.read_conceptual(path, report, source="cc12m"),
    "cc12m-wds": lambda: conceptual.read_mirror(
        sorted(path.glob("*.tar")), report, source="cc12m",
        translations=OnDisk(row[2:] for row in tables.caption_table(path / "translated.tsv", "url", Report()))),
    "sbu": lambda: conceptual.read_sbu(path, report),
    "coco.tsv": lambda: coco.read_coco(path, folder, report),
    "coco.json": lambda: coco.read_coco(path, folder, report),
    "flickr8k.json": lambda: flickr.read_flickr(path, folder, report, source="flickr8k"),
    "flickr30k.token": lambda: flickr.read_flickr(path, folder, report, source="flickr30k"),
    "flickr30k.csv": lambda: flickr.read_flickr(path, folder, report, source="flickr30k"),
    "xflickrco.jsonl": lambda: flickr.read_xflickrco(path, folder, report),
    "vizwiz_train.json": lambda: coco.read_vizwiz(path, folder, report),
    "vizwiz.json": lambda: coco.read_vizwiz(path, folder, report),
    "xm3600.jsonl": lambda: flickr.read_xm3600(path, folder, report),
    "unsplash": lambda: unsplash.read_unsplash(path, report),
    "wit.tsv.gz": lambda: wit.read_wit([path], report),
}[kind]()
records = sum(1 for _ in rows)
print(json.dumps({"seconds": time.process_time() - start, "peak_mib": peak(), "beyond_imports_mib": peak() - before,
                  "records": records, "kept": report.kept}))
"""


def captions(count: int) -> Iterator[str]:
    """Sentences of ten words; one sentence in three hundred is empty."""
    rng = np.random.default_rng(0)
    for start in range(0, count, 10_000):
        for numbers in rng.integers(0, len(WORDS), (min(10_000, count - start), 10)):
            yield "" if numbers[0] == numbers[1] == 0 else " ".join(WORDS[number] for number in numbers)


def write_cc12m(path: Path, count: int) -> None:
    with open(path, "w") as file:
        file.write("caption\turl\n")
        file.writelines(f"{caption}\t{ADDRESS.format(number)}\n" for number, caption in enumerate(captions(count)))


def write_cc12m_wds(folder: Path, count: int) -> None:
    """Tars of 10,000 samples, as img2dataset makes them, of one small picture; and the addresses' translations."""
    folder.mkdir()
    write_cc12m(folder / "translated.tsv", count)
    Image.new("RGB", (16, 16)).save(file := io.BytesIO(), "jpeg", optimize=True)
    picture = file.getvalue()
    facts = {"status": "success", "error_message": None, "width": 16, "height": 16, "original_width": 16,
             "original_height": 16, "exif": "{}", "sha256": hashlib.sha256(picture).hexdigest()}
    texts = captions(count)
    for start in range(0, count, 10_000):
        with open(folder / f"cc12m-train-{start // 10_000:04d}.tar", "wb") as tar:
            for number, caption in enumerate(itertools.islice(texts, 10_000), start):
                row = {"caption": caption, "url": ADDRESS.format(number), "key": f"{number:09d}", **facts}
                tar.write(tar_member(f"{number:09d}.jpg", picture))
                tar.write(tar_member(f"{number:09d}.txt", caption.encode()))
                tar.write(tar_member(f"{number:09d}.json", json.dumps(row).encode()))
            tar.write(bytes(1024))


def tar_member(name: str, content: bytes) -> bytes:
    """A file as `tarfile` puts it into a tar, without the minutes that it takes for three million."""
    header = bytearray(HEADER)
    header[: len(name)] = name.encode()
    header[124:135] = b"%011o" % len(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header + content + bytes(-len(content) % 512)


def write_sbu(folder: Path, count: int) -> None:
    folder.mkdir()
    urls = (f"http://static.flickr.com/{number % 4000}/{number:010d}_{number:010x}.jpg" for number in range(count))
    for name, lines in zip(SBU_FILES, (urls, captions(count)), strict=True):
        with open(folder / name, "w") as file:
            file.writelines(f"{line}\n" for line in lines)


def write_coco(path: Path, count: int) -> None:
    """Five captions a picture, far apart, as COCO's are."""
    pictures = count // 5
    with open(path, "w") as file:
        file.write("caption\timage_name\n")
        file.writelines(f"{caption}\t{number * 7919 % pictures:012d}.jpg\n"
                        for number, caption in enumerate(captions(count)))


def write_coco_json(path: Path, count: int, flags: Sequence[str] = ()) -> None:
    """The same as annotations. A flag, as VizWiz has them, is true in one annotation of a hundred."""
    pictures = count // 5
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(pictures)]
    rows = [{"id": number, "image_id": number * 7919 % pictures, "caption": caption,
             **{flag: number % 101 == place for place, flag in enumerate(flags)}}
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


def write_flickr30k(path: Path, count: int) -> None:
    """The same as published, or as Kaggle's .csv with its bars."""
    is_kaggle = path.suffix == ".csv"
    form = "{:012d}.jpg| {}| {}\n" if is_kaggle else "{:012d}.jpg#{}\t{}\n"
    with open(path, "w") as file:
        file.write("image_name| comment_number| comment\n" if is_kaggle else "")
        file.writelines(form.format(number // 5, number % 5, caption) for number, caption in enumerate(captions(count)))


def write_vizwiz_json(path: Path, count: int) -> None:
    """The same as a list of objects, which is how VizWiz was translated."""
    texts = captions(count)
    with open(path, "w") as file:
        for number in range(count // 5):
            row = {"image_path": f"{number:012d}.jpg", "captions": list(itertools.islice(texts, 5))}
            file.write(f'{", " if number else "["}{json.dumps(row)}')
        file.write("]")


def write_xflickrco(path: Path, count: int) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps({"sentences": [caption], "id": number, "img_path": f"{number:012d}.jpg"}) + "\n"
                        for number, caption in enumerate(captions(count)))


def write_xm3600(path: Path, count: int) -> None:
    """Two captions a picture in each language, each also in tokens."""
    texts = captions(count)
    with open(path, "w") as file:
        for number in range(count // (2 * len(LANGUAGES))):
            row = {"image/key": f"{number:012d}", "image/locale": "id"}
            for language in LANGUAGES:
                two = list(itertools.islice(texts, 2))
                row[language] = dict.fromkeys(("caption", "caption/tokenized", "caption/tokenized/lowercase"), two)
            file.write(json.dumps(row) + "\n")


def write_unsplash(folder: Path, count: int) -> None:
    """Nine keywords a photo, far apart; two fifths of them are sure. Lite has more, and so fewer photos."""
    folder.mkdir()
    count_photos = count // 10
    with open(folder / "photos.tsv000", "w", newline="") as file:
        table = csv.DictWriter(file, PHOTOS, delimiter="\t", lineterminator="\n")
        table.writeheader()
        table.writerows({"photo_id": f"{number:011x}", "photo_url": f"https://unsplash.com/photos/{number:011x}",
                         "photo_image_url": f"https://images.unsplash.com/photo-{number:011x}",
                         "photo_description": f'{caption} "{number}"', "ai_description": caption}
                        for number, caption in enumerate(captions(count_photos)))
    with open(folder / "keywords.tsv000", "w") as file:
        file.write("\t".join(KEYWORDS) + "\n")
        file.writelines(f"{number * 7919 % count_photos:011x}\t{caption[:12]}\t{number % 100}.5\t\tf\n"
                        for number, caption in enumerate(captions(count - count_photos)))


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
    "cc12m.tsv": write_cc12m, "cc12m-wds": write_cc12m_wds, "sbu": write_sbu, "coco.tsv": write_coco,
    "coco.json": write_coco_json, "flickr8k.json": write_flickr8k_json, "flickr30k.token": write_flickr30k,
    "flickr30k.csv": write_flickr30k, "xflickrco.jsonl": write_xflickrco,
    "vizwiz_train.json": partial(write_coco_json, flags=(*UNWANTED, "text_detected")), "vizwiz.json": write_vizwiz_json,
    "xm3600.jsonl": write_xm3600, "unsplash": write_unsplash, "wit.tsv.gz": write_wit,
}


def read(kind: str, count: int) -> dict:
    """The figures of READ for the reader of one kind of file; one picture in two hundred exists."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        for number in range(0, count // 5, 200):
            Path(folder, f"{number:012d}.jpg").touch()
        WRITERS[kind](Path(folder, kind), count)
        done = subprocess.run([sys.executable, "-c", READ, folder, kind], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def find_copies(count: int) -> dict:
    """Seconds to index the pictures and to ask for the near copies of QUERIES of them, a third planted."""
    import faiss

    from clipid_utils.data.cleaning.near_copies import CHUNK, NearIndex, Signatures

    rng = np.random.default_rng(0)
    spread = ((1, 1, 1, 45), (1, 1, 3, 15), (2, 2, 1, 25), (4, 4, 1, 20), (4, 4, 3, 6))  # light, tint, large and small
    blocks = np.full((count, 4, 4, 3), 120, np.float32)
    for height, width, channels, size in spread:
        noise = rng.normal(0, size, (count, height, width, channels)).astype(np.float32)
        blocks += noise.repeat(4 // height, 1).repeat(4 // width, 2)
    blocks = blocks.clip(0, 255).astype(np.uint8)
    one, other = rng.choice(count, 2 * (QUERIES // 3), replace=False).reshape(2, -1)
    hashes = rng.integers(0, 2**64, count, np.uint64)
    blocks[other], hashes[other] = blocks[one], hashes[one] ^ np.uint64(0b10110)

    def thumbnails(rows: np.ndarray) -> np.ndarray:  # not kept: 3 GB for a million
        return blocks[rows].repeat(8, 1).repeat(8, 2)

    queries = np.concatenate([one, rng.choice(count, QUERIES - len(one), replace=False)])
    faiss.omp_set_num_threads(1)
    start = time.process_time()
    index = NearIndex(thumbnails)
    index.add(hashes)
    built, start = time.process_time() - start, time.process_time()
    found = set()
    for rows in np.array_split(queries, len(queries) // CHUNK + 1):
        found |= {int(rows[row]) for row, _ in index.find(Signatures(hashes[rows], thumbnails(rows)), own=rows)}
    asked = time.process_time() - start
    assert found >= set(one.tolist())
    return {"build_seconds": built, "seconds": asked}


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
    print(f"\n{'pictures':>10}{'to index, s':>15}{'ms a query':>12}")
    for count in options.copies:
        report["copies"][str(count)] = found = find_copies(count)
        print(f"{count:10,}{found['build_seconds']:15.2f}{1000 * found['seconds'] / QUERIES:12.3f}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

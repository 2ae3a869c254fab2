"""Pictures from URLs: fetched politely and safely, made ready for training, and resumed after any interruption.

A folder has `pictures/`, `manifest.jsonl` (a line for each row that was tried, in the order in which they were done)
and, at the end, `captions.jsonl`. A line of the manifest is the row with its `status` (kept, refused for a permanent
reason, failed for a transient one), `error` and `tries` (0: a different row has the same URL, or it is not a URL), and
for a kept picture `path`, `sha256` and `bytes` of the file as it came, `width` and `height` of the JPEG.
"""

import hashlib
import itertools
import os
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from ssl import SSLContext
from weakref import WeakValueDictionary

import anyio
from anyio.from_thread import start_blocking_portal
from tqdm.auto import tqdm

import clipid_utils
from clipid_utils.data.captions import write_captions
from clipid_utils.data.download.addresses import PublicNetwork
from clipid_utils.data.download.fetcher import Fetcher, Limits, to_jpeg
from clipid_utils.data.download.manifest import Manifest, url_key
from clipid_utils.data.report import Report
from clipid_utils.data.shards import file_rows, numbered_rows, only_writer
from clipid_utils.data.sources.tables import SURROGATE
from clipid_utils.files import PARTIAL, input_files, numbered_lines, parse_line

AGENT = "clip-indonesian/{version} (+https://github.com/galuhsahid/clip-indonesian{contact})"
ROWS_AHEAD = 2000  # rows in progress or waiting for their host, so that a slow host delays the others less
FOLDER_SIZE = 10_000  # pictures: a folder with more is slow to list
LISTS = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz", ".parquet")


def download(
    rows: Iterable[dict], folder: str | os.PathLike, *, limits: Limits | None = None, contact: str = "",
    total: int | None = None, progress: bool = True, network: PublicNetwork | None = None,
    tls: SSLContext | None = None,
) -> Report:
    """Fetches the picture of each row into `folder`, and reports the outcome of all rows in its manifest.

    A row is `{"url", "captions", "source", "split", "row"}`; `row` is its number from 0, which names its picture. Rows
    are read as they are needed and may be millions. Called again with the same rows, after Ctrl-C or a kill or for
    transient failures, it asks only for rows that are not kept or refused yet; kept rows keep their first captions. A
    URL is fetched once, however many rows have it. A kill loses the rows in progress; a power cut may also leave some
    of the newest pictures empty. `contact` (a mail address or a page) is added to the User-Agent, so that the owners of
    sites can write to you. Raises ValueError for a row whose number has a different URL in the manifest.
    """
    folder = Path(folder).expanduser()
    agent = AGENT.format(version=clipid_utils.__version__, contact=f"; {contact}" if contact else "")
    with only_writer(folder), warnings.catch_warnings(), Manifest(folder / "manifest.jsonl") as manifest:
        warnings.filterwarnings("ignore", module="PIL")  # about odd pictures, which the manifest lists
        for leftover in folder.glob(f"*{PARTIAL}"):  # a kill left it: a half-written picture or manifest
            leftover.unlink()
        bar = tqdm(total=total, initial=manifest.counts.total(), desc="pictures", unit=" rows", disable=not progress)
        fetcher = Fetcher(limits or Limits(), agent, network or PublicNetwork(), tls)
        with bar, start_blocking_portal() as portal:  # a loop in a thread: a notebook's own loop runs already
            portal.call(_run, rows, folder, manifest, fetcher, bar)
        return _write_records(manifest, folder)


async def _run(rows: Iterable[dict], folder: Path, manifest: Manifest, fetcher: Fetcher, bar: tqdm) -> None:
    window, locks = anyio.Semaphore(ROWS_AHEAD), WeakValueDictionary()

    async def one(row: dict) -> None:
        lock = locks.setdefault(url_key(row["url"]), anyio.Lock())
        async with lock:  # the first row with a URL fetches it, and the others wait for its outcome
            if outcome := manifest.outcome(row["url"]):
                outcome["tries"] = 0
            else:
                store = partial(_store, folder=folder, number=row["row"], most_pixels=fetcher.limits.most_pixels)
                outcome = await fetcher.fetch(row["url"], store)
            manifest.add(row, outcome)
        bar.set_postfix({status: f"{count:,}" for status, count in manifest.counts.items()}, refresh=False)
        bar.update()
        window.release()

    try:
        async with fetcher.pool, anyio.create_task_group() as group:
            for count, row in enumerate(rows):
                if count % 100 == 0:
                    await anyio.lowlevel.checkpoint()  # if all rows are done already, nothing else would wait
                if not manifest.has(row):
                    await window.acquire()
                    group.start_soon(one, row)
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


def _store(file: bytes, folder: Path, number: int, most_pixels: int) -> dict:
    """Writes a picture. Under its final name it is whole or absent; to sync each to the disk would take too long."""
    jpeg, width, height = to_jpeg(file, most_pixels)
    path = Path("pictures", f"{number // FOLDER_SIZE:05d}", f"{number:09d}.jpg")
    part = folder / f"{path.name}{PARTIAL}"
    part.write_bytes(jpeg)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, folder / path)
    return {"path": path.as_posix(), "sha256": hashlib.sha256(file).hexdigest(), "bytes": len(file), "width": width,
            "height": height}


def _write_records(manifest: Manifest, folder: Path) -> Report:
    """Writes captions.jsonl, if there is a kept picture with a caption, and counts the outcomes."""
    report = Report()

    def records() -> Iterator[dict]:
        for line in manifest.lines():
            captions = [text for text in (SURROGATE.sub("", text) for text in line["captions"]) if text.strip()]
            reason = line["error"].split(":")[0] if line["error"] else None
            if line["captions"] and not captions:
                reason = reason or "empty captions"
            if reason:
                reason += " (may succeed later)" * (line["status"] == "failed")
                report.drop(reason, f"row {line['row'] + 1}: {line['url']}: {line['error'] or reason}")
                continue
            report.keep()
            if captions:
                yield {"image_path": line["path"], "captions": captions, "source": line["source"],
                       "split": line["split"]}

    found = records()
    if first := next(found, None):
        write_captions(itertools.chain([first], found), folder / "captions.jsonl")
    return report


def read_urls(lists: str | os.PathLike) -> Iterator[dict]:
    """The rows of lists of URLs: JSON lines or Parquet with `{"url": …, "captions": […]}`, or lines that are URLs.

    `lists` is a file, a folder or a glob. A row without `row` gets the number of its line, from 0 over all files. In a
    file that is not named .jsonl or .parquet, a line that is not JSON is a URL; its picture has no captions. Raises
    ValueError that names a bad line.
    """
    before = 0
    for path in input_files(lists, LISTS):
        number, is_text = 0, not {".jsonl", ".parquet"} & set(path.suffixes)
        for number, row, problem in _text_rows(path) if is_text else numbered_rows(path):
            if problem := problem or _problem(row):
                raise ValueError(f"{path}:{number}: {problem}: write {{\"url\": \"https://…\", \"captions\": [\"…\"]}}")
            yield {"row": before + number - 1, "source": None, "split": None, **row}
        before += number


def count_urls(lists: str | os.PathLike) -> int:
    """How many rows `read_urls` gives, bad lines included."""
    return sum(map(file_rows, input_files(lists, LISTS)))


def _text_rows(path: Path) -> Iterator[tuple[int, dict | None, str | None]]:
    for number, line in numbered_lines(path):
        if line.lstrip().startswith(b"{"):
            yield number, *parse_line(line)
        elif line := line.strip():
            yield number, {"url": line.decode("utf-8", "replace"), "captions": []}, None


def _problem(row: dict) -> str | None:
    captions, number = row.get("captions"), row.get("row", 0)
    fits = {"url": "url" in row, "row": type(number) is int and number >= 0,
            "captions": isinstance(captions, list) and all(isinstance(text, str) for text in captions),
            "source": isinstance(row.get("source"), str | None), "split": isinstance(row.get("split"), str | None)}
    return next((f"{key} is {row.get(key)!r}"[:80] for key, right in fits.items() if not right), None)

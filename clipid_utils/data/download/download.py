"""Pictures from URLs: fetched politely and safely, made ready for training, and resumed after any end.

A folder holds `pictures/`, `manifest.jsonl` (a line for each row that was tried, in the order they were done) and, when
the rows are through, `captions.jsonl`. A line of the manifest is the row with its `status` (kept, refused for good,
failed in a way that may pass), `error`, `tries` (0: as another row with the same URL), and of a kept picture `path`,
`sha256` and `bytes` of the file as it came, `width` and `height` of the JPEG.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from ssl import SSLContext

import anyio
from anyio.from_thread import start_blocking_portal
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

import clipid_utils
from clipid_utils.data.captions import write_captions
from clipid_utils.data.download.addresses import PublicNetwork
from clipid_utils.data.download.fetcher import Fetcher, Limits, Refused, parse_url, to_jpeg
from clipid_utils.data.report import Report
from clipid_utils.data.sources.tables import NO_TEXT, NOT_UTF8, text_lines

AGENT = "clip-indonesian/{version} (+https://github.com/galuhsahid/clip-indonesian{contact})"
ROW = ("row", "url", "captions", "source", "split")
OUTCOME = ("status", "path", "sha256", "bytes", "width", "height", "error", "tries")
AHEAD = 2000  # rows in work or waiting for their host's turn, so that a slow host holds up the others less
A_FOLDER = 10_000  # pictures: more in one folder are slow to list


def download(
    rows: Iterable[dict], folder: str | os.PathLike, *, limits: Limits | None = None, contact: str = "",
    total: int | None = None, progress: bool = True, network: PublicNetwork | None = None,
    tls: SSLContext | None = None,
) -> Report:
    """Fetches the picture of each row into `folder` and says what became of all rows that its manifest holds.

    A row is `{"url", "captions", "source", "split", "row"}`, the last its number from 0, which names its picture; rows
    are read as they are needed and may be millions. Called again with the same rows after Ctrl-C or a kill, or for what
    failed, it asks only for what is not kept or refused yet; what is kept keeps the captions of its first time. A URL
    is fetched once, however many rows name it. A kill loses what was in work; a power cut may also leave some of the
    newest pictures empty. Sites like to know whom to write to: `contact` (a mail address, a page) is added to the
    User-Agent. Raises ValueError for a row that the manifest knows with another URL.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"{folder}: another download writes here: wait for it, or choose another folder") from None
    with lock, warnings.catch_warnings(), Manifest(folder / "manifest.jsonl") as manifest:
        warnings.filterwarnings("ignore", module="PIL")  # of odd pictures, which the manifest lists
        agent = AGENT.format(version=clipid_utils.__version__, contact=f"; {contact}" if contact else "")
        shutil.rmtree(folder / ".parts", ignore_errors=True)  # what a kill left half-written
        (folder / ".parts").mkdir()
        try:
            with start_blocking_portal() as portal:  # a loop in a thread: a notebook's own loop runs already
                portal.call(partial(_run, rows, folder, manifest, limits or Limits(), agent,
                                    network or PublicNetwork(), tls, total, progress))
        finally:
            shutil.rmtree(folder / ".parts")
        return _write_records(manifest, folder)


def read_urls(path: str | os.PathLike) -> Iterator[dict]:
    """The rows of a JSON lines file, `{"url": …, "captions": […]}` a line; a row without `row` gets its line's number.

    Blank lines count and are passed over. Raises ValueError that names a line that is no such row.
    """
    for number, line in text_lines(Path(path)):
        if not line.strip():
            continue
        try:
            row = {"row": number - 1, "source": None, "split": None, **json.loads(line)}
            problem = _problem(row)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem or NO_TEXT.search(line):
            raise ValueError(f"{path}:{number}: no row ({problem or NOT_UTF8}): write "
                             '{"url": "https://…", "captions": ["…"]}')
        yield row


def _problem(row: dict) -> str | None:
    """What of a row would only show once all are downloaded; a bad `url` is listed as such."""
    _, captions, number = row["url"], row["captions"], row["row"]  # KeyError for what is missing
    fits = {
        "row": type(number) is int and number >= 0,
        "captions": isinstance(captions, list) and all(isinstance(text, str) for text in captions),
        "source": isinstance(row["source"], str | None), "split": isinstance(row["split"], str | None),
    }
    return next((f"{key} is {row[key]!r}"[:80] for key, right in fits.items() if not right), None)


class Manifest:
    """The lines of a manifest, and an index of them on disk: which rows are done, and where the line of a URL is.

    Opening it leaves out what a kill cut off and the rows that failed in a way that may pass. The index is made anew
    each time, so that it cannot disagree.
    """

    def __init__(self, path: Path):
        self.path, self.counts = path, Counter()
        index = path.with_name(".index")
        index.unlink(missing_ok=True)
        self.index = sqlite3.connect(index, check_same_thread=False, isolation_level=None)
        self.index.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN;"
                                 "CREATE TABLE rows (row INTEGER PRIMARY KEY, url BLOB, place INTEGER);"
                                 "CREATE INDEX urls ON rows (url)")
        part = path.with_name(path.name + ".part")
        self.file = open(part, "wb")
        for line in self._whole_lines():
            if line["status"] != "failed":
                self.add(line)
        os.fsync(self.file.fileno())  # or else a power cut could leave an empty file under the name
        self.file.close()
        os.replace(part, path)
        self.file, self.reader = open(path, "ab"), open(path, "rb")

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *error) -> None:
        for opened in (self.file, self.reader, self.index):
            opened.close()
        self.path.with_name(".index").unlink()

    def _whole_lines(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.path}:{number}: no JSON ({error.msg}): mend or delete the line; its row "
                                     "is then fetched again") from None

    def add(self, line: dict) -> None:
        """Appends the line of a row; raises ValueError where there is one already."""
        try:
            self.index.execute("INSERT INTO rows VALUES (?, ?, ?)", (line["row"], _key(line["url"]), self.file.tell()))
        except sqlite3.IntegrityError:
            raise ValueError(f"{self.path}: row {line['row']} comes twice: number the rows from 0") from None
        # Half a character, which JSON can hold and UTF-8 cannot, is written as JSON's escape
        self.file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self.file.flush()  # what is flushed outlives a kill of this process
        self.counts[line["status"]] += 1

    def has(self, row: dict) -> bool:
        """Whether a row is done; raises ValueError where another was done under its number."""
        known = self.index.execute("SELECT url FROM rows WHERE row = ?", (row["row"],)).fetchone()
        if known and known[0] != _key(row["url"]):
            raise ValueError(f"{self.path}: row {row['row']} has another url there than {row['url']!r}: give the same "
                             "rows again, or other rows another folder")
        return known is not None

    def outcome(self, url) -> dict | None:
        """What became of a URL in another row."""
        found = self.index.execute("SELECT place FROM rows WHERE url = ? LIMIT 1", (_key(url),)).fetchone()
        return found and {key: value for key, value in self._line(found[0]).items() if key in OUTCOME}

    def lines(self) -> Iterator[dict]:
        """All lines in the order of their rows, whichever were done first."""
        for (place,) in self.index.execute("SELECT place FROM rows ORDER BY row"):
            yield self._line(place)

    def _line(self, place: int) -> dict:
        self.reader.seek(place)
        return json.loads(self.reader.readline())


def _key(url: str) -> bytes:
    """Sixteen bytes for a URL without its fragment; parsing it would take a hundred times as long."""
    url = str(url).strip().partition("#")[0]
    return hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=16).digest()


async def _run(
    rows: Iterable[dict], folder: Path, manifest: Manifest, limits: Limits, agent: str, network: PublicNetwork,
    tls: SSLContext | None, total: int | None, progress: bool,
) -> None:
    done = manifest.counts.total()
    window, asked = anyio.Semaphore(AHEAD), {}  # rows in work, and by URL those that wait for its answer

    def record(row: dict, outcome: dict) -> None:
        line = {key: row.get(key) for key in ROW}
        manifest.add({**line, **{key: outcome.get(key) for key in OUTCOME}})
        bar.set_postfix({status: f"{count:,}" for status, count in manifest.counts.items()}, refresh=False)
        bar.update()

    async def one(row: dict, key: bytes) -> None:
        finish = partial(_store, folder=folder, number=row["row"], most_pixels=limits.most_pixels)
        try:
            outcome = await fetcher.fetch(parse_url(row["url"]), finish)
        except Refused as error:
            outcome = {"status": "refused", "error": ": ".join(error.args), "tries": 0}
        for place, same in enumerate(asked.pop(key)):
            record(same, outcome if place == 0 else {**outcome, "tries": 0})
            window.release()

    with tqdm(total=total, initial=done, desc="pictures", unit=" rows", disable=not progress) as bar:
        try:
            async with Fetcher(limits, agent, network, tls) as fetcher, anyio.create_task_group() as group:
                for count, row in enumerate(rows):
                    if count % 100 == 0:
                        await anyio.lowlevel.checkpoint()  # where all rows are done already, nothing else would wait
                    if manifest.has(row):
                        continue
                    await window.acquire()  # before it is looked whether the URL is asked for: that can end meanwhile
                    key = _key(row["url"])
                    if key in asked:
                        asked[key].append(row)
                    elif outcome := manifest.outcome(row["url"]):
                        record(row, {**outcome, "tries": 0})
                        window.release()
                    else:
                        asked[key] = [row]
                        group.start_soon(one, row, key)
        except ExceptionGroup as group:
            raise group.exceptions[0] from None


def _store(file: bytes, folder: Path, number: int, most_pixels: int) -> dict:
    """Keeps a downloaded picture; under its own name it is there whole or not at all."""
    jpeg, width, height = to_jpeg(file, most_pixels)
    path = Path("pictures", f"{number // A_FOLDER:05d}", f"{number:09d}.jpg")
    part = folder / ".parts" / path.name
    part.write_bytes(jpeg)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    os.replace(part, folder / path)
    return {"path": path.as_posix(), "sha256": hashlib.sha256(file).hexdigest(), "bytes": len(file), "width": width,
            "height": height}


def _write_records(manifest: Manifest, folder: Path) -> Report:
    report = Report()

    def kept() -> Iterator[dict]:
        for line in manifest.lines():
            reason = None if line["status"] == "kept" else line["error"].split(":")[0]
            captions = [text for text in (NO_TEXT.sub("", text) for text in line["captions"]) if text.strip()]
            if reason or not captions:
                reason = (reason or "no caption") + (" (may pass)" if line["status"] == "failed" else "")
                report.drop(reason, f"row {line['row']}: {line['url']}: {line['error'] or reason}")
                continue
            report.keep()
            yield {"image_path": line["path"], "captions": captions, "source": line["source"], "split": line["split"]}

    write_captions(kept(), folder / "captions.jsonl")
    return report

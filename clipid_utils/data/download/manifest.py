"""The manifest of a download: JSON lines that survive a kill, with an index of them on disk."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from clipid_utils.data.sources.disk_table import hash_key, temporary_database
from clipid_utils.files import parse_line, whole_file

ROW = ("row", "url", "captions", "source", "split")
OUTCOME = ("status", "path", "sha256", "bytes", "width", "height", "error", "tries")


class Manifest:
    """The lines of `manifest.jsonl`, and an index: which rows are done, and where the line of a URL is.

    Opening it removes a line that a kill cut off, and the rows that failed for a transient reason.
    """

    def __init__(self, path: Path):
        self.path, self.counts, self.index = path, Counter(), temporary_database()
        self.index.execute("create table rows (row integer primary key, url integer, place integer)")
        self.index.execute("create index urls on rows (url)")
        path.touch()
        with whole_file(path) as self.file:
            for line in self._whole_lines():
                if line["status"] != "failed":
                    self.add(line, line)
        self.file, self.reader = open(path, "ab"), open(path, "rb")

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *error) -> None:
        for opened in (self.file, self.reader, self.index):
            opened.close()

    def _whole_lines(self) -> Iterator[dict]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    return
                record, problem = parse_line(line)
                if problem:
                    raise ValueError(f"{self.path}:{number}: {problem}; or delete the line to fetch its row again")
                yield record

    def add(self, row: dict, outcome: dict) -> None:
        """Appends the line of a row. Raises ValueError if the row has a line already."""
        place = self.file.tell(), hash_key(url_key(row["url"]))
        try:
            self.index.execute("insert into rows (row, place, url) values (?, ?, ?)", (row["row"], *place))
        except sqlite3.IntegrityError:
            raise ValueError(f"{self.path}: row {row['row'] + 1} comes twice: give each row its own number") from None
        line = {**{key: row.get(key) for key in ROW}, **{key: outcome.get(key) for key in OUTCOME}}
        # Half of a character, which JSON can contain and UTF-8 cannot, is written as JSON's escape
        self.file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self.file.flush()  # flushed lines survive a kill of this process
        self.counts[line["status"]] += 1

    def has(self, row: dict) -> bool:
        """Whether a row is done. Raises ValueError if its number was done with a different URL."""
        known = self.index.execute("select url from rows where row = ?", (row["row"],)).fetchone()
        if known and known[0] != hash_key(url_key(row["url"])):
            raise ValueError(f"{self.path}: row {row['row'] + 1} had a different URL than {row['url']!r}: give the "
                             "same rows again, or choose a different folder")
        return known is not None

    def outcome(self, url: object) -> dict | None:
        """The outcome of a URL in a different row, or None."""
        found = self.index.execute("select place from rows where url = ?", (hash_key(url_key(url)),)).fetchone()
        return found and self._line(*found)

    def lines(self) -> Iterator[dict]:
        """All lines in the order of their rows."""
        for found in self.index.execute("select place from rows order by row"):
            yield self._line(*found)

    def _line(self, place: int) -> dict:
        self.reader.seek(place)
        return json.loads(self.reader.readline())


def url_key(url: object) -> str:
    """A URL without its fragment; to parse it would take a hundred times as long."""
    return str(url).strip().partition("#")[0]

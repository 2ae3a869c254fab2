"""What has to be remembered of a file larger than memory: in a temporary file, which SQLite keeps and removes."""

import hashlib
import itertools
import operator
import sqlite3
from collections.abc import Iterable, Iterator


def _disk() -> sqlite3.Connection:
    """A temporary database, on disk beyond a few MiB, which is gone when it is closed."""
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    for pragma in ("cache_size=-4096", "journal_mode=off", "synchronous=off", "temp_store=file"):
        database.execute(f"pragma {pragma}")
    database.execute("begin")
    return database


def gathered(rows: Iterable[tuple[str, int | str, str]]) -> Iterator[tuple[str, int | str, list[str]]]:
    """(key, its first place, its texts) of (key, place, text) rows, keys and texts in the order in which they came.

    Reads all rows before the first key; they wait on disk.
    """
    database = _disk()
    try:
        database.execute("create table rows (key text, place, text text)")
        database.executemany("insert into rows values (?, ?, ?)", rows)
        found = database.execute("select key, place, text, min(rowid) over (partition by key) as first, rowid as row "
                                 "from rows order by first, row")
        for key, group in itertools.groupby(found, key=operator.itemgetter(0)):
            group = list(group)
            yield key, group[0][1], [row[2] for row in group]
    finally:
        database.close()


class OnDisk:
    """A text for each key, the first that came; the keys are held as 64 bits of a hash."""

    def __init__(self, items: Iterable[tuple[str, str]] = ()):
        self.database = _disk()
        self.database.execute("create table texts (key integer primary key, text text)")
        rows = ((_hash(key), text) for key, text in items)
        self.database.executemany("insert or ignore into texts values (?, ?)", rows)

    def add(self, key: str, text: str = "") -> bool:
        """Whether the key was not there before."""
        return self.database.execute("insert or ignore into texts values (?, ?)", (_hash(key), text)).rowcount == 1

    def get(self, key: str) -> str | None:
        """The key's text, None where there is none."""
        found = self.database.execute("select text from texts where key = ?", (_hash(key),)).fetchone()
        return found and found[0]


def _hash(key: str) -> int:
    key = key.encode("utf-8", "surrogatepass")  # JSON can hold half a character
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)

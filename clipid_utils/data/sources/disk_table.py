"""Tables in a temporary file on disk, for data that may be larger than memory. SQLite makes and removes the file."""

import contextlib
import hashlib
import itertools
import operator
import sqlite3
from collections.abc import Iterable, Iterator


def temporary_database() -> sqlite3.Connection:
    """A database in memory up to a few MiB and on disk beyond. It disappears when it is closed."""
    database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
    database.executescript("pragma cache_size = -4096; pragma journal_mode = off; pragma synchronous = off;"
                           "pragma temp_store = file; begin")
    return database


def gathered(rows: Iterable[tuple[str, int | str, str]]) -> Iterator[tuple[str, int | str, list[str]]]:
    """Groups (key, place, text) rows by key: each key, the place of its first row, and its texts.

    Keys and texts keep the order in which they came. All rows are read and stored on the disk before the first key is
    given.
    """
    with contextlib.closing(temporary_database()) as database:
        database.execute("create table rows (key text, place, text text)")
        database.executemany("insert into rows values (?, ?, ?)", rows)
        found = database.execute("select key, place, text, min(rowid) over (partition by key) as first, rowid as row "
                                 "from rows order by first, row")
        for key, group in itertools.groupby(found, key=operator.itemgetter(0)):
            group = list(group)
            yield key, group[0][1], [row[2] for row in group]


class OnDisk:
    """A text for each key: the first that was given. Keys are stored as 64 bits of a hash."""

    def __init__(self, items: Iterable[tuple[str, str]] = ()):
        self.database = temporary_database()
        self.database.execute("create table texts (key integer primary key, text text)")
        rows = ((hash_key(key), text) for key, text in items)
        self.database.executemany("insert or ignore into texts values (?, ?)", rows)

    def add(self, key: str, text: str = "") -> bool:
        """Adds a key with its text. Returns whether the key was new."""
        return self.database.execute("insert or ignore into texts values (?, ?)", (hash_key(key), text)).rowcount == 1

    def get(self, key: str) -> str | None:
        """The text of a key, or None."""
        found = self.database.execute("select text from texts where key = ?", (hash_key(key),)).fetchone()
        return found and found[0]


def hash_key(key: str) -> int:
    """64 bits of a text's hash, as a signed integer for SQLite."""
    key = key.encode("utf-8", "surrogatepass")  # JSON can contain half of a character
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big", signed=True)

"""Pictures of rows: decoded, or skipped and counted."""

import warnings
from collections.abc import Callable

import numpy as np

from clipid_utils.pictures import picture_source

MOST_UNREADABLE = 1000  # bad rows one after the other: so many mean that a folder or a column is missing

Picture = str | bytes | dict | None  # a path, the bytes of a file, or {"bytes", "path"} as `datasets` stores pictures


def try_decode(decode: Callable, picture: Picture, captions: list[str]) -> np.ndarray | Exception:
    """The pixels of a picture, or the reason why its row cannot be used."""
    try:
        if not picture_source(picture):
            raise ValueError("it has no picture")
        if not captions:
            raise ValueError("it has no caption")
        return decode(picture_source(picture))
    except Exception as error:  # a broken file can raise anything
        return error


def picture_name(picture: Picture) -> str:
    """The path of a picture, if it has one."""
    name = picture.get("path") if isinstance(picture, dict) else picture
    return name if isinstance(name, str) else "a picture without a name"


def trouble(picture: Picture, error: Exception) -> str:
    """One line about a row that is skipped. Other errors' texts may have an address in memory, which changes."""
    name, known = picture_name(picture), isinstance(error, ValueError | FileNotFoundError)
    return f"{name}: {str(error).removeprefix(f'{name}: ') if known else type(error).__name__}"


class Skipped:
    """Warns about rows that are skipped, with their number: about the first, the second, the fourth, the eighth, …"""

    def __init__(self):
        self.seen = set()

    def report(self, messages: list[str]) -> None:
        """Counts the rows that these messages are about, each row once."""
        for message in messages:
            count = len(self.seen) + (message not in self.seen)
            if message not in self.seen and count & (count - 1) == 0:
                warnings.warn(f"{message}: skipped, a different picture takes its place ({count} so far)", stacklevel=2)
            self.seen.add(message)

"""Samples of WebDataset tars: within limits, and only from whole tars."""

import gzip
import itertools
import os
import tarfile
import zlib
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path

MAX_MEMBER = 2**27  # bytes of one file in a tar
MAX_RATIO = 100  # a packed tar may unpack to as many times its size: pictures do not shrink, bombs do


class _Member(tarfile.TarInfo):
    """A header of a tar. Where tarfile would stop silently, at a header that is cut off or broken, this raises."""

    @classmethod
    def frombuf(cls, *arguments) -> "_Member":
        try:
            member = super().frombuf(*arguments)
        except tarfile.EOFHeaderError:  # the zeros that mark the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} in place of a file or the mark of the end") from None
        if member.size > MAX_MEMBER:  # before a byte of it is read
            raise tarfile.ReadError(f"{member.name!r} has {member.size:,} bytes")
        return member


def tar_samples(path: str | os.PathLike) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Name and files, by ending, of each sample: a run of files with one name up to the first dot ("a.input.jpg").

    The tar may be gzipped. Raises ValueError for a file that is not a tar, is cut off or broken, has a file of over 128
    MiB, or unpacks to more than 100 times its size.
    """
    try:
        for name, group in itertools.groupby(_files(Path(path)), key=itemgetter(0)):
            yield name, {ending: content for _, ending, content in group}
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole tar ({error}): fetch it again") from error


def _files(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """Folder and name, ending and content of each file of a tar."""
    with open(path, "rb") as raw:
        opened = gzip.open if raw.read(2) == b"\x1f\x8b" else open
    with opened(path, "rb") as unpacked, tarfile.open(fileobj=unpacked, mode="r|", tarinfo=_Member) as tar:
        for member in tar:
            tar.members.clear()  # tarfile would keep each that was read
            if member.size > MAX_MEMBER or member.offset > MAX_RATIO * path.stat().st_size:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_RATIO} times its size, or has a huge file")
            folder, base = os.path.split(member.name)
            name, _, ending = base.partition(".")
            if name and member.isfile():
                yield os.path.join(folder, name), ending, tar.extractfile(member).read()
        end = tar.offset
        while part := unpacked.read(2**16):  # to the checksum of gzip
            end += len(part)
            if end > MAX_RATIO * path.stat().st_size:
                raise tarfile.ReadError(f"it unpacks to more than {MAX_RATIO} times its size")

"""Files: written whole or not at all, JSON lines with their line numbers, inputs by file, folder or glob, and pictures.

This is the only code of its kind in the library. Everything that writes a result, reads JSON lines or opens a picture
goes through here, so that an interruption, a byte-order mark or a broken picture is handled once.
"""

import codecs
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

PARTIAL = ".partial"  # the ending of a file or folder that is not finished
PICTURE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif .heic .heif".split())
MAX_LINE = 2**24  # bytes of one line of a text file


# Writing

@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write to. It takes the name `path` when the block ends; after an error nothing is left behind.

    The data is on the disk before the rename, so a reader sees the old file or the new one, never a part. If two
    processes write the same file, the last one wins. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """An empty folder to fill. It takes the name `path`, in place of an older one, when the block ends.

    After an error nothing is left behind, and the older folder stays as it was.
    """
    path = Path(path)
    partial, older = (path.with_name(f"{path.name}.{os.getpid()}{end}") for end in (PARTIAL, f".old{PARTIAL}"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.is_dir():
            os.replace(path, older)  # quicker than to delete it: a kill in between would leave half of it
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def write_json(path: str | os.PathLike, value: object, indent: int | None = 2) -> None:
    """Writes a value as JSON in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.write((json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode())


def write_json_lines(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes one JSON object a line in UTF-8, whole or not at all."""
    with whole_file(path) as file:
        file.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


# Reading

def read_json(path: str | os.PathLike) -> object:
    """The value of a JSON file; a byte-order mark is accepted. Raises ValueError that names the file and the place."""
    try:
        return json.loads(Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON ({error.msg}): correct the line") from None


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and bytes of each line of a text file, without its line end.

    A byte-order mark, Windows line ends and gzip (by the ending .gz) are accepted. Raises ValueError, with the line,
    for UTF-16, for a line of over 16 MiB (a small .gz can unpack to many GB), and for a .gz that is cut off or broken.
    """
    number, path = 0, Path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE + 1), b""), 1):
                if number == 1:
                    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                        raise ValueError(f"{path}:1: this is UTF-16: save the file as UTF-8")
                    line = line.removeprefix(codecs.BOM_UTF8)
                if len(line) > MAX_LINE:
                    raise ValueError(f"{path}:{number}: the line is longer than {MAX_LINE:,} bytes: this is not a text "
                                     "file of lines; fetch it again")
                yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}:{number + 1}: not gzip, or cut off ({error}): fetch the file again") from None


def json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict | None, str | None]]:
    """For each line that is not blank: its number from 1, its JSON object, and a problem with its remedy.

    One of the last two is None. What `numbered_lines` would raise for the file is the last problem.
    """
    number = 0
    try:
        for number, line in numbered_lines(path):
            if line := line.strip():
                yield number, *parse_line(line)
    except ValueError as error:  # the file's, which also ends it
        yield number + 1, None, str(error).removeprefix(f"{path}:{number + 1}: ")


def parse_line(line: bytes) -> tuple[dict | None, str | None]:
    """The JSON object of one line and None, or None and a problem with its remedy."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, f"byte {error.start + 1} of the line is not UTF-8: save the file as UTF-8"
    except json.JSONDecodeError as error:
        return None, f"not valid JSON ({error.msg} at character {error.pos + 1}): write one record a line"
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return None, f"JSON that cannot be read ({error}): write one record a line"
    if not isinstance(record, dict):
        return None, f"{str(record)[:40]!r} is not a record: write an object, {{\"key\": value, …}}"
    return record, None


def read_json_lines(path: str | os.PathLike) -> Iterator[tuple[int, dict]]:
    """Number, from 1, and object of each line. Raises ValueError, "file:line: problem", at the first bad one."""
    for number, record, problem in json_lines(path):
        if problem:
            raise ValueError(f"{Path(path).name}:{number}: {problem}")
        yield number, record


def input_files(given: str | os.PathLike, suffixes: tuple[str, ...] = (".jsonl", ".parquet")) -> list[Path]:
    """The files that a command's input names: one file, the part files of a folder, or a glob; `~` is expanded.

    A folder gives its files that end in `suffixes`, sorted by name; hidden and unfinished ones are left out. Raises
    ValueError, with a remedy, if there is no such file.
    """
    path = Path(given).expanduser()
    if path.is_dir():
        files = (file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        found = sorted(file for file in files if file.name.endswith(suffixes))
        if not found:
            raise ValueError(f"{given}: no file here ends in {' or '.join(suffixes)}: name a file, a folder or a glob")
        return found
    if path.is_file():
        return [path]
    found = sorted(file for file in map(Path, glob.glob(str(path), recursive=True))
                   if file.is_file() and file.suffix != PARTIAL)
    if not found:
        raise ValueError(f"{given}: no such file or folder, and no file fits it as a glob: correct the path")
    return found


HEAD = 2**20  # bytes that file_identity reads from the start of a file


def file_identity(path: str | os.PathLike, head: int = HEAD) -> str:
    """16 hexadecimal digits that change when the file's content changes: of its size, time, and first `head` bytes."""
    path = Path(path)
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + file.read(head))
    return digest.hexdigest()[:16]


def model_identity(folder: str | os.PathLike) -> str:
    """16 hexadecimal digits that change when a file of a model's folder changes, wherever the folder is.

    metrics.json and README.md, which describe the model, do not count, nor do hidden files.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.name not in ("metrics.json", "README.md"):
            with open(path, "rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def need(module: str, extra: str) -> ModuleType:
    """The module of an optional dependency. Raises ImportError, with the command that installs it, if it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}, from an extra that is not installed: {install_line(extra)}") from error


def install_line(extra: str) -> str:
    """The command that installs an extra of this package."""
    try:
        address = next(url for url in metadata.metadata("clip-indonesian").get_all("Project-URL") or ())
        return f'pip install "clip-indonesian[{extra}] @ git+{address.split(", ")[1]}"'
    except (metadata.PackageNotFoundError, StopIteration):  # used from a clone without an installation
        return f'pip install -e ".[{extra}]" in the clone'


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def import_transformers() -> ModuleType:
    """transformers, without its advice that PyTorch is missing, which this project does not use."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        return importlib.import_module("transformers")
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def usable_threads() -> int:
    """A thread for each core, up to 8: more would wait for Python's lock, and each holds a batch."""
    return min(8, usable_cores())


# Pictures

class PictureError(ValueError):
    """A picture that cannot be read; the message says why, and what to do."""


def open_picture(
    source: str | os.PathLike | bytes | dict | Image.Image, *, short_side: int | None = None,
    root: str | os.PathLike | None = None, draft: int | None = None,
) -> Image.Image:
    """A picture of any kind as a person sees it: RGB, upright, on white where transparent (`to_rgb`).

    `source` is a path (a relative one starts at `root`), the bytes of a file, {"bytes", "path"} as `datasets` stores
    pictures, or an open picture. With `short_side`, a larger picture is reduced to it. With `draft`, a JPEG file may be
    decoded at 1/2, 1/4 or 1/8 of its size, at least `draft` pixels, which is several times faster. Raises PictureError
    for anything that cannot be decoded to its end, FileNotFoundError for a missing file.
    """
    if isinstance(source, dict):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if source is None:
        raise PictureError("there is no picture, only a null: give its path or its bytes")
    if not isinstance(source, bytes | Image.Image):
        source = Path(root or "", os.path.expanduser(source))
        if not source.exists():
            raise FileNotFoundError(f"{source}: no such picture: correct the path")
    try:
        if isinstance(source, Image.Image):
            return reduce_picture(to_rgb(source), short_side)
        with _opened(source) as image:
            if draft := draft or 2 * (short_side or 0):
                image.draft(None, (draft, draft))
            return reduce_picture(to_rgb(image), short_side)
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, struct.error, …
        name = f"{source}: " if isinstance(source, Path) else ""
        if isinstance(error, PictureError):
            reason = str(error)
        elif isinstance(error, UnidentifiedImageError):  # its text has the name again, or an address in memory
            reason = "not a picture that can be read (its format is not known)"
        else:
            reason = f"not a picture that can be read ({type(error).__name__}: {error})"
        raise PictureError(f"{name}{reason}") from error


def _opened(source: Path | bytes) -> Image.Image:
    """Pillow's picture. Its HEIC decoder, a package of its own, is only loaded for a HEIC file."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        if isinstance(source, bytes):
            head = source[:12]
        else:
            with open(source, "rb") as opened:
                head = opened.read(12)
        if not is_heic(head):
            raise
        try:
            need("pillow_heif", "heic").register_heif_opener()
        except ImportError as error:
            raise PictureError(f"a HEIC picture: {error}") from None
        return Image.open(file)


def is_heic(head: bytes) -> bool:
    """Whether bytes begin as a HEIC file does."""
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def reduce_picture(image: Image.Image, short_side: int | None) -> Image.Image:
    """The picture with its short side at most `short_side` pixels."""
    if not short_side or min(image.size) <= short_side:
        return image
    size = [max(1, round(side * short_side / min(image.size))) for side in image.size]
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2)


# The seven EXIF orientations other than upright, and the turn that makes such a picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as a person sees it: RGB, upright, on white where transparent.

    An RGB picture stays as it is. Three differences from transformers' CLIPImageProcessor, which loses the picture:
    - EXIF orientation: there the picture stays on its side, here it is turned upright;
    - 16-bit greys: there all above 255 is white, here 65535 is white (in mode I: the largest value, if above 65535);
    - transparent: its older versions show the hidden colour, mostly black; here, and in its newer versions, white.
    """
    image.load()  # some formats know their orientation and transparency only then
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is not None:  # to flip it is number 0
        image = image.transpose(turn)
        for key in ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"):
            image.info.pop(key, None)  # otherwise it would be turned again
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of 16 bits (mode I;16) or of up to 32 (mode I, which also has 8-bit pictures), as 8 bits."""
    values = np.asarray(image).astype(np.int64)  # in this machine's byte order: numpy 2.1 crashes with others below
    top = max(65535, int(values.max())) if image.mode != "I" or values.max() > 255 else 255
    values = np.where(values == image.info.get("transparency", -1), top, values).clip(0)
    return Image.fromarray((values * (255 / top) + 0.5).astype(np.uint8))


MAX_PIXELS = 2**24  # of a picture on its way to a square


def decode_square(
    file: str | os.PathLike | bytes | dict | Image.Image, size: int, *, resize: int | tuple[int, int] | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The middle square of a picture after its short side is brought to `size` pixels, like CLIP.

    `resize` is a different length for the short side, or the (height, width) to which the picture is stretched, as for
    ViT; where that is less than `size`, the rest is black. An open RGB picture gives the same bytes as transformers'
    CLIPImageProcessor. A file gives them to one level, since only the square is resized; if it is a JPEG of at least
    twice the size, it is decoded at a fraction of its size, and pixels can differ by a few levels. Raises the errors of
    `open_picture`.
    """
    resize = size if resize is None else resize
    image = open_picture(file, draft=resize if isinstance(resize, int) else max(resize))
    if isinstance(resize, int):
        width, height = (int(side * resize / min(image.size)) for side in image.size)
    else:
        height, width = resize
    left, top = (width - size) // 2, (height - size) // 2
    whole = isinstance(file, Image.Image) and width * height <= MAX_PIXELS
    if whole or left < 0 or top < 0:
        return np.asarray(image.resize((width, height), resample).crop((left, top, left + size, top + size)))
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, (left + size) * across, (top + size) * down)
    return np.asarray(image.resize((size, size), resample, box=box))

"""The weights of a Hugging Face style folder as numpy arrays, whichever library wrote them, read without that library.

Files are mapped into memory: an array is a view on its file, made when it is asked for, and its pages are given back
when it is let go. Who copies one array after the other so holds the weights once, not twice. Nothing in a file is
trusted: no code of it runs, and no array reaches beyond its bytes.
"""

import json
import math
import mmap
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import msgpack
import numpy as np

from clipid_utils.model.pretrained.torch_pickle import MAGIC, Refusal, Storage, Tensor, read_old_pickles, read_pickle

_CODES = {  # safetensors' name of a dtype: numpy's
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}
_DTYPES = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in _CODES.values()}

Arrays = dict[str, Callable[[], np.ndarray]]  # by name; the call makes the array


def read_weights(folder: Path) -> Mapping[str, np.ndarray]:
    """The weights in a folder by name, from the first of these files that it holds: `model.safetensors`,
    `model.safetensors.index.json`, `flax_model.msgpack`, `pytorch_model.bin`, `pytorch_model.bin.index.json`.

    Names are the file's own, flax's nested ones with dots between; of shards, those that the index names. Every access
    makes a new read-only view on the file, which must not be overwritten in place while a view lives (replacing it is
    safe). Raises FileNotFoundError where a file is missing and ValueError for one that is damaged, lies about its sizes
    or asks for anything but tensors, with the file, the key and what to do: all here, before any array is used.
    """
    for name, reader in _READERS.items():
        if (folder / name).is_file():
            return _Weights(_shards(folder / name, reader) if name.endswith(".json") else reader(folder / name))
    raise FileNotFoundError(f"{folder} holds no weights: looked for {', '.join(_READERS)}; "
                            "name the folder that save_pretrained wrote, or fetch the model again")


class _Weights(Mapping):
    def __init__(self, arrays: Arrays):
        self._arrays = arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


def _reading(reader: Callable[[BinaryIO], dict]) -> Callable[[Path], dict]:
    """Opens the file for a reader and turns what a bad one makes it raise into a ValueError that names the file."""

    def read(path: Path) -> dict:
        with open(path, "rb") as file:
            try:
                if file.read(24) == b"version https://git-lfs.":
                    raise Refusal("is git-lfs's placeholder, not the weights: run `git lfs pull` in its folder")
                return reader(file)
            except Refusal as error:
                raise ValueError(f"{path} {error}") from error
            except Exception as error:  # damage shows in any place of a parser, so as anything
                kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
                raise ValueError(f"{path} cannot be read ({kind}{error}): fetch or save it again") from error

    return read


def _read_at(file: BinaryIO, place: int, count: int) -> bytes:
    """What describes the arrays is read so and not from the mapping, where one touch may map 2 MiB."""
    file.seek(place)
    return file.read(count)


# --- Arrays in mapped files -------------------------------------------------------------------------------------------


class _View(NamedTuple):
    data: mmap.mmap
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    strides: tuple[int, ...]  # in bytes

    def __call__(self) -> np.ndarray:
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        array = np.ndarray(self.shape, self.dtype, self.data, self.start, self.strides)
        weakref.finalize(array, _give_back, self.data, self.start, self.stop).atexit = False
        return array


def _give_back(data: mmap.mmap, start: int, stop: int) -> None:
    """Unmaps a range and what came with it, as pages that are mapped count as this process's memory.

    An array that still lies there is not harmed: its pages are mapped again when they are read.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        start, stop = start // 2**21 * 2**21, -(-stop // 2**21) * 2**21  # the kernel maps up to 2 MiB around a touch
        data.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _view(data: mmap.mmap, key: str, dtype, shape, start, stop, strides=None) -> _View:
    """An array in `data[start:stop]`: all of it in row-major order or, with strides in elements, what they reach."""
    if dtype not in _DTYPES:
        raise Refusal(f"holds {key!r} as {dtype}, not as one of {', '.join(_DTYPES)}: save it as float32")
    numbers = [start, stop, *(shape if isinstance(shape, list | tuple) else "?"), *(strides or ())]
    same_rank = strides is None or len(strides) == len(shape)
    if not all(type(n) is int and n >= 0 for n in numbers) or not same_rank or len(shape) > 64:
        raise ValueError(f"{key!r} has a shape, strides or a place that no array has")
    width = _DTYPES[dtype].itemsize
    steps = strides if strides is not None else [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    steps = [step * width if n > 1 else 0 for n, step in zip(shape, steps, strict=True)]
    reach = 0 if 0 in shape else sum((n - 1) * step for n, step in zip(shape, steps, strict=True)) + width
    fits = start + reach <= stop <= len(data) and (strides is not None or start + reach == stop)
    if not fits or math.prod(n or 1 for n in shape) * width >= 2**63:
        raise ValueError(f"{key!r} of shape {tuple(shape)} does not fit the bytes that are there for it")
    return _View(data, _DTYPES[dtype], tuple(shape), start, start + reach, tuple(steps))


# --- safetensors: eight bytes that say how long the header is, the header in JSON, the tensors ------------------------


@_reading
def _safetensors(file: BinaryIO) -> Arrays:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = 8 + int.from_bytes(_read_at(file, 0, 8), "little")
    if not 8 < begin <= len(data):
        raise ValueError(f"its header would end at byte {begin} of {len(data)}")
    arrays = {}
    for key, entry in json.loads(_read_at(file, 8, begin - 8)).items():
        if key != "__metadata__":
            try:
                shape, (start, stop) = entry["shape"], entry["data_offsets"]
                dtype = _CODES.get(entry["dtype"], entry["dtype"])
                start, stop = (begin + place if place >= 0 else -1 for place in (start, stop))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{key!r} lacks its dtype, shape or place") from error
            arrays[key] = _view(data, key, dtype, shape, start, stop)
    return arrays


# --- flax_model.msgpack: nested maps, whose arrays are (shape, dtype, bytes) in msgpack again -------------------------

_CHUNKED = "__msgpack_chunked_array__"  # flax cuts arrays above 1 GiB: {_CHUNKED: True, "shape": {…}, "chunks": {…}}
_SIZE_WIDTH = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4}  # how many bytes of a bin or ext say its size
_EXT_SIZE = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}  # the ext types of one size
_ARRAY, _NUMPY_SCALAR = 1, 3  # flax's ext types; 2 is Python's complex


@_reading
def _flax(file: BinaryIO) -> Arrays:
    data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tree, stop = _flax_value(file, data, 0, "")
    if not isinstance(tree, dict) or stop != len(data):
        raise ValueError("it is not one dict in msgpack")
    arrays: Arrays = {}
    for key, value in _leaves(tree):
        if key in arrays or not callable(value):
            raise Refusal(f"holds {key!r} twice or not as an array ({type(value).__name__}): save the params alone")
        arrays[key] = value
    return arrays


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict):
        yield name, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{name}.{key}" if name else f"{key}")


def _flax_value(file: BinaryIO, data: mmap.mmap, at: int, name: str) -> tuple[Any, int]:
    """The value at a place, a map as dict and an array as view, and the place after it.

    `msgpack` decodes all but the arrays' bytes, which it would copy: their places are reckoned and they stay there.
    """
    code, reader = _read_at(file, at, 1)[0], _decode_at(file, at)
    if code >> 4 == 0x8 or code in (0xDE, 0xDF):  # a map
        tree, count = {}, reader.read_map_header()
        at += reader.tell()
        for _ in range(count):
            reader = _decode_at(file, at)
            key = reader.unpack()
            tree[key], at = _flax_value(file, data, at + reader.tell(), f"{name}.{key}" if name else f"{key}")
        return (_joined(tree, name) if _CHUNKED in tree else tree), at
    if code not in _EXT_SIZE and not 0xC7 <= code <= 0xC9:
        return reader.unpack(), at + reader.tell()
    *size, kind = _read_at(file, at + 1, _SIZE_WIDTH.get(code, 0) + 1)
    body = at + 2 + len(size)
    stop = body + (_EXT_SIZE.get(code) or int.from_bytes(size, "big"))
    reader = _decode_at(file, body)
    if kind not in (_ARRAY, _NUMPY_SCALAR) or reader.read_array_header() != 3:
        raise ValueError(f"{name!r} is no array as flax writes them")
    shape, dtype = reader.unpack(), reader.unpack()
    start = body + reader.tell() + 1  # of the bytes' own size
    size = _read_at(file, start, _SIZE_WIDTH[_read_at(file, start - 1, 1)[0]])
    if start + len(size) + int.from_bytes(size, "big") != stop:
        raise ValueError(f"{name!r} has two sizes")
    return _view(data, name, dtype, shape, start + len(size), stop), stop


def _decode_at(file: BinaryIO, place: int) -> msgpack.Unpacker:
    file.seek(place)
    return msgpack.Unpacker(file, read_size=512, strict_map_key=False)


def _joined(tree: dict, name: str) -> Callable[[], np.ndarray]:
    """One array of the chunks that flax cut it into; they are copied together when it is asked for."""
    shape, chunks = ([tree[part][str(i)] for i in range(len(tree[part]))] for part in ("shape", "chunks"))
    if min(shape) < 0 or not chunks or sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"{name!r} of shape {tuple(shape)} does not fit its chunks")
    return lambda: np.concatenate([chunk().reshape(-1) for chunk in chunks]).reshape(shape)


# --- pytorch_model.bin: a zip of one pickle and the storages that it names; before torch 1.6, five pickles and those --


@_reading
def _torch(file: BinaryIO) -> Arrays:
    old, data = MAGIC in _read_at(file, 0, 32), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    tensors, start_of = _torch_old(file, len(data)) if old else _torch_zip(file)
    return {key: _torch_view(data, key, tensor, start_of(tensor.storage)) for key, tensor in tensors.items()}


_StartOf = Callable[[Storage], int | None]  # where a storage's bytes begin, if they are there


def _torch_zip(file: BinaryIO) -> tuple[dict[str, Tensor], _StartOf]:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip without the one data.pkl that torch writes")
    if any(info.compress_type or info.compress_size != info.file_size for info in members.values()):
        raise Refusal("is a compressed zip, which torch does not write: unpack it and zip it with -0")
    if f"{roots[0]}byteorder" in members and archive.read(f"{roots[0]}byteorder") != b"little":
        raise Refusal("was written on a big-endian machine: save it again on a little-endian one")

    def start_of(storage: Storage) -> int | None:
        member = members.get(f"{roots[0]}data/{storage.key}")
        if member is None or not 0 <= storage.numel * _DTYPES[storage.dtype].itemsize <= member.file_size:
            return None
        header = _read_at(file, member.header_offset, 30)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        return member.header_offset + 30 + lengths if header[:4] == b"PK\3\4" else None

    return read_pickle(archive.read(f"{roots[0]}data.pkl")), start_of


def _torch_old(file: BinaryIO, size: int) -> tuple[dict[str, Tensor], _StartOf]:
    """After the pickles lies, for every storage, the number of its elements in eight bytes and then they."""
    file.seek(0)
    tensors, keys = read_old_pickles(file)
    at, named, starts = file.tell(), {}, {}
    for tensor in tensors.values():
        named.setdefault(tensor.storage.key, tensor.storage)
    for key in keys:
        if key not in named:
            raise ValueError(f"no tensor is in storage {key!r}")
        numel, start = int.from_bytes(_read_at(file, at, 8), "little", signed=True), at + 8
        at = start + numel * _DTYPES[named[key].dtype].itemsize
        if not start <= at <= size:
            raise ValueError(f"storage {key!r} would end at byte {at} of {size}")
        starts[named[key]._replace(numel=numel)] = start  # of this size and type alone
    if at != size:
        raise ValueError(f"its storages end at byte {at} of {size}")
    return tensors, starts.get


def _torch_view(data: mmap.mmap, key: str, tensor: Tensor, start: int | None) -> _View:
    dtype, storage, numel = tensor.storage
    width = _DTYPES[dtype].itemsize
    if start is None or not 0 <= tensor.offset <= numel:
        raise ValueError(f"{key!r} is in storage {storage!r}, which it lacks or has elsewhere or in another size")
    first, stop = start + tensor.offset * width, start + numel * width
    return _view(data, key, dtype, tensor.shape, first, stop, tensor.strides)


# --- Shards, and the order of the files -------------------------------------------------------------------------------


@_reading
def _index(file: BinaryIO) -> dict[str, str]:
    shard_of = json.loads(_read_at(file, 0, -1))["weight_map"]
    for key, shard in shard_of.items():
        if Path(shard).name != shard:
            raise Refusal(f"has {key!r} in {shard!r}, which is not the name of a file beside it: correct it")
    return shard_of


def _shards(path: Path, reader: Callable[[Path], Arrays]) -> Arrays:
    shard_of, shards = _index(path), {}
    for key, shard in shard_of.items():
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path.parent / shard}, where {path.name} has {key!r}, is missing: fetch it")
        shards[shard] = shards.get(shard) or reader(path.parent / shard)
        if key not in shards[shard]:
            raise ValueError(f"{path} has {key!r} in {shard}, which lacks it: fetch or save both again")
    return {key: shards[shard][key] for key, shard in shard_of.items()}


_READERS = {
    "model.safetensors": _safetensors,
    "model.safetensors.index.json": _safetensors,
    "flax_model.msgpack": _flax,
    "pytorch_model.bin": _torch,
    "pytorch_model.bin.index.json": _torch,
}

"""Reads the weights of a Hugging Face style folder as numpy arrays, whichever library wrote them.

Arrays of safetensors and torch files are views on the mapped file; they are made when they are asked for. Nothing in a
file is trusted: no code of it runs, and no array reaches beyond its bytes.
"""

import io
import math
import mmap
import zipfile
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import msgpack
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from clipid_utils.model.pretrained import torch_pickle
from clipid_utils.model.pretrained.processor_files import read_json
from clipid_utils.model.pretrained.torch_pickle import Refusal, Storage, Tensor

_CODES = {  # safetensors' name of a dtype: numpy's
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
}
_DTYPES = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in _CODES.values()}

Arrays = dict[str, Callable[[], np.ndarray]]  # by name; the call makes the array


class Weights(UserDict):
    """Arrays by name, each made when it is asked for; `del` frees the memory of one that is not needed any more."""

    def __getitem__(self, name: str) -> np.ndarray:
        return self.data[name]()


def read_weights(folder: Path) -> Weights:
    """The weights in a folder by name, from the first of these files that is there: `model.safetensors`,
    `model.safetensors.index.json`, `flax_model.msgpack`, `pytorch_model.bin`, `pytorch_model.bin.index.json`,
    `open_clip_model.safetensors`, `open_clip_pytorch_model.bin`.

    Names are the file's own, with dots between flax's nested names. Arrays are read-only; do not overwrite the file in
    place while one of them is used (you may replace it). Raises FileNotFoundError if a file is missing and ValueError
    if one is damaged, has wrong sizes or asks for anything but tensors; the message names the file, the key and the
    remedy. All errors are raised here, before any array is used.
    """
    for name, reader in _READERS.items():
        if (folder / name).is_file():
            return Weights(_shards(folder / name, reader) if name.endswith(".json") else _read(folder / name, reader))
    raise FileNotFoundError(f"{folder} has no weights: looked for {', '.join(_READERS)}; "
                            "name the folder that save_pretrained wrote, or fetch the model again")


def read_torch(path: Path) -> Weights:
    """The tensors of one file of torch, with any name, as `read_weights` reads `pytorch_model.bin`."""
    return Weights(_read(path, _torch))


def _read(path: Path, reader: Callable[[Path], Arrays]) -> Arrays:
    """Turns every error that a reader raises for a bad file into a ValueError that names the file."""
    try:
        with open(path, "rb") as file:
            if file.read(24) == b"version https://git-lfs.":
                raise Refusal("is a git-lfs pointer, not the weights: run `git lfs pull` in its folder")
        return reader(path)
    except Refusal as error:
        raise ValueError(f"{path} {error}") from error
    except Exception as error:  # damage can raise anything, anywhere in a parser
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be read ({kind}{error}): fetch or save it again") from error


def _view(path: Path, name: str, dtype: str, shape, start: int, numel: int, offset: int = 0, strides=None):
    """A function that makes an array in the `numel` numbers at byte `start`; offset and strides count numbers.

    It is called once here, so that numpy raises ValueError if something does not fit.
    """
    if dtype not in _DTYPES:
        raise Refusal(f"has {name!r} as {dtype}, not as one of {', '.join(_DTYPES)}: save it as float32")
    kind, numbers = _DTYPES[dtype], [start, numel, offset, *shape, *(strides or ())]
    same_rank = strides is None or len(strides) == len(shape)
    if not same_rank or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name!r} has a shape, strides or a place that no array has")
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))] if strides is None else strides
    reach = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    steps = tuple(step * kind.itemsize if n > 1 else 0 for n, step in zip(shape, steps, strict=True))

    def array() -> np.ndarray:
        if 0 in shape:
            return np.empty(shape, kind)
        data = np.memmap(path, np.uint8, "r", start, (numel * kind.itemsize,))
        return np.ndarray(shape, kind, data, offset * kind.itemsize, steps)

    try:
        if offset + reach > numel or math.prod(n or 1 for n in shape) * kind.itemsize >= 2**63:
            raise ValueError(f"it would reach element {offset + reach} of {numel}")
        array()
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name!r} of shape {tuple(shape)} does not fit its bytes ({error})") from error
    return array


# safetensors: eight bytes with the header's length, the header, and the tensors without gaps

def _safetensors(path: Path) -> Arrays:
    arrays = {}
    with safe_open(path, "numpy") as stored, open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for name in stored.offset_keys():
            part = stored.get_slice(name)
            dtype, shape = _CODES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
            arrays[name] = _view(path, name, dtype, shape, start, math.prod(shape))
            start += math.prod(shape) * _DTYPES[dtype].itemsize
    return arrays


# flax_model.msgpack: nested dicts, in which an array is (shape, dtype, bytes) in msgpack again

def _flax(path: Path) -> Arrays:
    """Reads all arrays, one after the other: flax's own msgpack_restore needs the memory three times.

    Arrays above 1 GiB, which flax cuts into chunks, are refused; no tower has one.
    """
    with open(path, "rb") as file:
        reader = msgpack.Unpacker(file, max_buffer_size=2**31 - 1, strict_map_key=False, ext_hook=_flax_array)
        tree = reader.unpack()
        if file.read(1) or reader.read_bytes(1):
            raise ValueError("it is not one dict in msgpack")
    arrays: Arrays = {}
    for names, value in flatten_dict(tree).items():
        name = ".".join(map(str, names))
        if name in arrays or not isinstance(value, np.ndarray):
            raise Refusal(f"has {name!r} twice or not as an array ({type(value).__name__}): save the params alone")
        arrays[name] = lambda value=value: value
    return arrays


def _flax_array(kind: int, data: bytes) -> np.ndarray:
    shape, dtype, numbers = msgpack.unpackb(data)
    if dtype not in _DTYPES:
        raise Refusal(f"has an array of {dtype}, not of one of {', '.join(_DTYPES)}: save it as float32")
    # In pages of its own, which go back to the system with the array; malloc would keep them for later
    pages = memoryview(mmap.mmap(-1, max(1, len(numbers))))[: len(numbers)]
    pages[:] = numbers
    return np.frombuffer(pages, _DTYPES[dtype]).reshape(shape)


# pytorch_model.bin: a zip of one pickle and the storages that it names; before torch 1.6 five pickles and storages

_StartOf = Callable[[Storage], int | None]  # the byte at which a storage begins, or None if it is not there


def _torch(path: Path) -> Arrays:
    with open(path, "rb") as file:
        head = file.read(torch_pickle.MAX_PICKLE)
        tensors, start_of = _torch_old(file, head) if torch_pickle.MAGIC in head[:32] else _torch_zip(file)
        arrays: Arrays = {}
        for name, tensor in tensors.items():
            (dtype, storage, numel), start = tensor.storage, start_of(tensor.storage)
            if start is None:
                raise ValueError(f"{name!r} is in storage {storage!r}, which is missing or of a different size")
            arrays[name] = _view(path, name, dtype, tensor.shape, start, numel, tensor.offset, tensor.strides)
        return arrays


def _torch_zip(file: BinaryIO) -> tuple[dict[str, Tensor], _StartOf]:
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError("it is a zip without the one data.pkl that torch writes")
    if any(info.compress_type or info.compress_size != info.file_size for info in members.values()):
        raise Refusal("is a compressed zip, which torch does not write: unpack it and zip it with -0")
    if members[f"{roots[0]}data.pkl"].file_size > torch_pickle.MAX_PICKLE:
        raise Refusal("has a data.pkl that is too large: save the model's state_dict alone, or as model.safetensors")
    if f"{roots[0]}byteorder" in members and archive.open(f"{roots[0]}byteorder").read(9) != b"little":
        raise Refusal("was written on a big-endian machine: save it again on a little-endian one")

    def start_of(storage: Storage) -> int | None:
        member = members.get(f"{roots[0]}data/{storage.key}")
        if member is None or not 0 <= storage.numel * _DTYPES[storage.dtype].itemsize <= member.file_size:
            return None
        file.seek(member.header_offset)
        header = file.read(30)
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        return member.header_offset + 30 + lengths if header[:4] == b"PK\3\4" else None

    return torch_pickle.read_pickle(archive.read(f"{roots[0]}data.pkl")), start_of


def _torch_old(file: BinaryIO, head: bytes) -> tuple[dict[str, Tensor], _StartOf]:
    """After the pickles comes each storage: the number of its elements in eight bytes, and the elements."""
    tensors, keys, at = torch_pickle.read_old_pickles(head)
    storages, starts = {tensor.storage.key: tensor.storage for tensor in tensors.values()}, {}
    for key in keys:
        dtype, _, numel = storages[key]
        file.seek(at)
        if int.from_bytes(file.read(8), "little", signed=True) != numel:
            raise ValueError(f"storage {key!r} does not have the {numel} elements that its tensors expect")
        starts[storages[key]] = at + 8
        at += 8 + numel * _DTYPES[dtype].itemsize
    if at != file.seek(0, io.SEEK_END):
        raise ValueError(f"its storages end at byte {at}, not where the file ends")
    return tensors, starts.get


# Shards, and the order of the files

def _shards(path: Path, reader: Callable[[Path], Arrays]) -> Arrays:
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict):
        raise ValueError(f"{path} cannot be read (it has no weight_map): fetch or save it again")
    shards: dict[str, Arrays] = {}
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} has {name!r} in {shard!r}, which is not the name of a file beside it: correct it")
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path.parent / shard}, where {path.name} has {name!r}, is missing: fetch it")
        shards[shard] = shards.get(shard) or _read(path.parent / shard, reader)
        if name not in shards[shard]:
            raise ValueError(f"{path} has {name!r} in {shard}, which lacks it: fetch or save both again")
    return {name: shards[shard][name] for name, shard in shard_of.items()}


_READERS = {
    "model.safetensors": _safetensors,
    "model.safetensors.index.json": _safetensors,
    "flax_model.msgpack": _flax,
    "pytorch_model.bin": _torch,
    "pytorch_model.bin.index.json": _torch,
    "open_clip_model.safetensors": _safetensors,
    "open_clip_pytorch_model.bin": _torch,
}

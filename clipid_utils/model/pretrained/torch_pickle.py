"""Reads the pickles of a `pytorch_model.bin` without running code: they say where each tensor is in the file.

A pickle is a program, and `pickle.load` would run anything that it asks for. Here it can only build dicts, lists,
numbers, texts and the records below. Everything else is refused before it happens, and memory is bounded by the size
of the pickle. Since torch 1.6 the file is a zip with one pickle. Older files begin with five pickles: torch's magic
number, the version of the format, the machine's sizes, the state dict, and the keys of the storages that follow.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the pickled number that a file of torch before 1.6 begins with
MAX_PICKLE = 2**23  # bytes; the pickle of 10,000 tensors has a quarter of this
_VERSION = 1001  # the only version of the old format

STORAGES = {  # torch's classes of storage: numpy's name of their numbers
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64",
}


class Refusal(ValueError):
    """A file that is refused although it may be undamaged; the text follows the file's name and gives the remedy."""


class Storage(NamedTuple):
    """One flat array of the file. In a zip it is the member `data/<key>`. Tied tensors share one."""

    dtype: str
    key: str
    numel: int


class Tensor(NamedTuple):
    """The place of a tensor in its storage, in elements: the arguments of torch._utils._rebuild_tensor_v2."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: Any = None
    hooks: Any = None
    metadata: Any = None


def read_pickle(pickled: bytes) -> dict[str, Tensor]:
    """The tensors of a pickled state dict by name. Their numbers are the file's own and are not checked yet.

    Raises Refusal for a pickle that asks for anything else, and any exception for a damaged one.
    """
    return _tensors(_load(io.BytesIO(pickled), _GLOBALS))


def read_old_pickles(head: bytes) -> tuple[dict[str, Tensor], list, int]:
    """The tensors of a file of torch before 1.6, the storages' keys in their order, and where the storages begin.

    `head` is the beginning of the file, up to MAX_PICKLE bytes. Raises the same errors as `read_pickle`.
    """
    stream = io.BytesIO(head)
    magic, version, machine = (_load(stream, {}) for _ in range(3))
    if (magic, version) != (int.from_bytes(MAGIC, "little"), _VERSION):
        raise Refusal(f"is not in version {_VERSION} of torch's format before 1.6: save it again with a newer torch")
    if machine["little_endian"] is not True:
        raise Refusal("was written on a big-endian machine: save it again on a little-endian one")
    return _tensors(_load(stream, _GLOBALS)), _load(stream, {}), stream.tell()


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise Refusal(f"is not a dict but a {type(state).__name__}: save the model's state_dict")
    for key, tensor in dict.items(state):
        if type(key) is not str or type(tensor) is not Tensor or tensor.metadata:  # complex ones may have conj or neg
            what = f"{key!r}, a {type(tensor).__name__}" if type(key) is str else f"a key of type {type(key).__name__}"
            raise Refusal(f"has more than plain tensors by name ({what}): save the model's state_dict alone")
    return state


# The safe instructions. The others can call, copy or reserve more than their bytes.
_OPCODES = frozenset("""
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG FLOAT STRING UNICODE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND
    APPENDS EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL
    BINPERSID REDUCE BUILD""".split())


def _load(stream: io.BytesIO, allowed: Mapping[str, Callable]) -> Any:
    """The value of the next pickle of a stream. Its instructions are checked before the first one runs."""
    start, size = stream.tell(), len(stream.getbuffer())
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name not in _OPCODES or opcode.name.endswith("PUT") and not 0 <= argument <= size:
            raise Refusal("is not a pickle of tensors by name: save the model's state_dict alone, or as "
                          "model.safetensors")
    return _Unpickler(stream.getvalue()[start : stream.tell()], allowed).load()


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, allowed: Mapping[str, Callable]):
        super().__init__(io.BytesIO(pickled), encoding="utf-8")
        self.allowed, self.copies_left = allowed, len(pickled)

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise Refusal(f"asks for {module}.{name}: tensors do not need it, so it was not run. If you trust the "
                          "file, open it with torch and save its state_dict as model.safetensors")
        return self.allowed[f"{module}.{name}"](self)

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _device, numel, *view = pid
        if (kind, type(storage), type(key), type(numel)) != ("storage", str, str, int):
            raise ValueError("it names a storage that is not one")
        if view not in ([], [None]):
            raise Refusal("has a view on a part of a storage, as only old torch writes: save it with a newer torch")
        return Storage(STORAGES[storage], key, numel)

    def ordered(self, *items: Any) -> OrderedDict:
        """An OrderedDict. All copies together have at most one item for each byte of the pickle."""
        made = OrderedDict(*items)
        self.copies_left -= len(made)
        if self.copies_left < 0:
            raise ValueError("it copies one dict many times")
        return made


# Each entry makes a new function, so that a pickle cannot change one that a later pickle gets
_GLOBALS = {
    "collections.OrderedDict": lambda unpickler: lambda *items: unpickler.ordered(*items),
    "torch._utils._rebuild_tensor_v2": lambda _: lambda *arguments: Tensor(*arguments),
    "torch._utils._rebuild_parameter": lambda _: lambda tensor, *_: tensor,
    "torch.Size": lambda _: lambda values: values,  # a copy of each would take quadratic memory
    "torch.device": lambda _: lambda *_: None,
    **{f"torch.{storage}": lambda _, storage=storage: storage for storage in STORAGES},
    **{f"torch.{dtype}": lambda _, dtype=dtype: dtype for dtype in STORAGES.values()},
}

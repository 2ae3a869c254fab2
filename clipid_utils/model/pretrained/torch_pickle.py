"""What the pickles in a `pytorch_model.bin` say, with no code of them run: which tensor lies where in which storage.

A pickle is a program, and `pickle.load` would run anything that it asks for. Here it can build dicts, lists, numbers
and the records below; whatever else it asks for is refused by name. Since torch 1.6 the file is a zip with one pickle;
before, it began with five: torch's magic number, the version of the format, the machine's sizes, the state dict, and
the keys of the storages whose bytes follow. In those but the fourth not even the records are allowed.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number that a file of torch before 1.6 begins with, as its pickle has it
_VERSION = 1001  # the only one that there was
_LONGEST = 2**20  # bytes of one thing in a pickle that is read from an open file: torch writes 64 KiB in one piece

STORAGES = {  # torch's classes of storage: numpy's name of what is in them
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64",
}


class Refusal(ValueError):
    """What is wrong with a file that is not just damaged; the text follows the file's name and says what to do."""


class Storage(NamedTuple):
    """One flat array of the file, in a zip the member `data/<key>`; tied tensors share one."""

    dtype: str
    key: str
    numel: int


class Tensor(NamedTuple):
    """Where a tensor lies in its storage, in elements: the arguments of torch._utils._rebuild_tensor_v2."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: Any = None
    hooks: Any = None
    metadata: Any = None


def read_pickle(pickled: bytes) -> dict[str, Tensor]:
    """The tensors of a pickled state dict by name; their numbers are the file's own and still to be checked.

    Raises Refusal for a pickle that asks for anything else, before that is done, and any exception for a damaged one.
    """
    return _tensors(_Unpickler(io.BytesIO(pickled), encoding="utf-8").load())


def read_old_pickles(file: BinaryIO) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file of torch before 1.6 and its storages' keys, in the order in which their bytes follow.

    Leaves the file at the first storage. Raises as `read_pickle` does; that the keys are each there once is checked.
    """
    pieces = _Pieces(file)
    magic, version, machine = (_PlainUnpickler(pieces, encoding="utf-8").load() for _ in range(3))
    if magic != int.from_bytes(MAGIC, "little") or type(machine) is not dict or "little_endian" not in machine:
        raise ValueError("its first pickles are not those that torch writes")
    if version != _VERSION:
        raise Refusal(f"is not in version {_VERSION} of torch's format of before 1.6: save it with a newer torch")
    if machine["little_endian"] is not True:
        raise Refusal("was written on a big-endian machine: save it again on a little-endian one")
    tensors = _tensors(_OldUnpickler(pieces, encoding="utf-8").load())
    keys = _PlainUnpickler(pieces, encoding="utf-8").load()
    if type(keys) is not list or any(type(key) is not str for key in keys) or len(set(keys)) < len(keys):
        raise ValueError("its list of storages is none, or has one of them twice")
    return tensors, keys


def _tensors(state: Any) -> dict[str, Tensor]:
    if not isinstance(state, dict):
        raise Refusal(f"holds no dict but a {type(state).__name__}: save the model's state_dict")
    for key, tensor in state.items():
        if type(key) is not str or type(tensor) is not Tensor or tensor.metadata:  # complex ones may carry conj, neg
            what = f"{key!r}, a {type(tensor).__name__}" if type(key) is str else f"a key of type {type(key).__name__}"
            raise Refusal(f"holds more than plain tensors by name ({what}): save the model's state_dict alone")
        if tuple(map(type, tensor[:4])) != (Storage, int, tuple, tuple):
            raise ValueError(f"{key!r} has no place in a storage")
    return state


_GLOBALS = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": tuple,
    "torch.device": lambda *_: None,
    **{f"torch.{storage}": storage for storage in STORAGES},
    **{f"torch.{dtype}": dtype for dtype in STORAGES.values()},
}
_OPCODES = {getattr(pickle, name)[0] for name in """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG FLOAT STRING UNICODE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINSTRING SHORT_BINSTRING BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND
    APPENDS EMPTY_DICT DICT SETITEM SETITEMS PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL
    INST BINPERSID REDUCE BUILD""".split()}


def _refuse_opcode(unpickler: pickle._Unpickler) -> None:
    raise Refusal("is no pickle of tensors by name: save the model's state_dict alone, or as model.safetensors")


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler and not the one in C: its instructions can be taken away one by one, and no file can make
    it reserve memory by naming a large number.
    """

    allowed: Mapping[str, Any] = _GLOBALS
    dispatch = {code: load if code in _OPCODES else _refuse_opcode for code, load in pickle._Unpickler.dispatch.items()}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.allowed:
            raise Refusal(f"asks for {module}.{name}: tensors need no such thing, so nothing of it was run. If you "
                          "trust the file, open it with torch and save its state_dict as model.safetensors")
        return self.allowed[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage, key, _device, numel = pid
        if (kind, type(storage), type(key), type(numel)) != ("storage", str, str, int):
            raise ValueError("it names a storage that is none")
        return Storage(STORAGES[storage], key, numel)

    def load_build(self) -> None:
        """Drops the `_metadata` that a module's state dict carries as an attribute; nothing else has a state."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            _refuse_opcode(self)

    dispatch[pickle.BUILD[0]] = load_build


class _OldUnpickler(_Unpickler):
    def persistent_load(self, pid: Any) -> Storage:
        *storage, view = pid
        if view is not None and len(pid) == 6:
            raise Refusal("holds a view on a part of a storage, as only old torch writes: save it with a newer one")
        return super().persistent_load(storage)


class _PlainUnpickler(_Unpickler):
    """For numbers, text, dicts and lists of them."""

    allowed: Mapping[str, Any] = {}

    def persistent_load(self, pid: Any) -> Storage:
        raise Refusal("names a storage where none belongs: save the model's state_dict again")


class _Pieces:
    """An open file, of which no more is read at once than is there and than a pickle needs.

    A file's own `read` reserves all that it is asked for, and its `readline` may not end before the file does.
    """

    def __init__(self, file: BinaryIO):
        self._file = file

    def read(self, count: int) -> bytes:
        piece = self._file.read(count) if 0 <= count <= _LONGEST else b""
        if len(piece) != count:
            raise ValueError("a pickle of it ends too early")
        return piece

    def readline(self) -> bytes:
        line = self._file.readline(_LONGEST)
        if not line.endswith(b"\n"):
            raise ValueError("a pickle of it ends too early")
        return line

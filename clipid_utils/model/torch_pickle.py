"""What the pickle in a `pytorch_model.bin` says, with no code of it run: which tensor lies where in which storage.

A pickle is a program, and `pickle.load` would run anything that it asks for. Here it can build dicts, lists, numbers
and the records below; whatever else it asks for is refused by name.
"""

import io
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

STORAGES = {  # torch's classes of storage: numpy's name of what is in them
    "BoolStorage": "bool", "ByteStorage": "uint8", "CharStorage": "int8", "ShortStorage": "int16",
    "IntStorage": "int32", "LongStorage": "int64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32", "DoubleStorage": "float64",
}


class Refusal(ValueError):
    """What is wrong with a file that is not just damaged; the text follows the file's name and says what to do."""


class Storage(NamedTuple):
    """One flat array of the zip, the member `data/<key>`; tied tensors share one."""

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
    state = _Unpickler(io.BytesIO(pickled), encoding="utf-8").load()
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

    dispatch = {code: load if code in _OPCODES else _refuse_opcode for code, load in pickle._Unpickler.dispatch.items()}

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _GLOBALS:
            raise Refusal(f"asks for {module}.{name}: tensors need no such thing, so nothing of it was run. If you "
                          "trust the file, open it with torch and save its state_dict as model.safetensors")
        return _GLOBALS[f"{module}.{name}"]

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

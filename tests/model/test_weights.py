"""Weights: every kind of file comes back exactly; a file that lies or attacks is refused, in bounded memory."""

import io
import json
import mmap
import pickle
import struct
import sys
import tracemalloc
import weakref
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from flax import serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from clipid_utils.model.pretrained import torch_pickle, weights
from clipid_utils.model.pretrained.weights import read_weights

GOLDEN = Path(__file__).parent.parent / "golden"
DTYPES = {
    "BoolStorage": bool, "ByteStorage": np.uint8, "CharStorage": np.int8, "ShortStorage": np.int16,
    "IntStorage": np.int32, "LongStorage": np.int64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "FloatStorage": np.float32, "DoubleStorage": np.float64,
}
anew = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # each example overwrites the one file


def same(array, expected):
    assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
    assert array.tobytes() == expected.tobytes()


def arrays_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a.weight": rng.normal(size=(3, 5)).astype(np.float32), "a.bias": rng.normal(size=5).astype(np.float16),
        "b.weight": rng.normal(size=(2, 3, 2)).astype(ml_dtypes.bfloat16), "ids": np.arange(4)[None],
        "mask": np.array([True, False, True]), "scale": np.array(2.6592, np.float32), "none": np.zeros((0, 3), "f"),
    }


# Writers of torch's files, opcode by opcode, so that they can lie

def build(value) -> bytes:
    """Opcodes that put a value on the pickle's stack; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case tuple() | list():
            opening, closing = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
            return opening + b"".join(map(build, value)) + closing
        case dict():
            return b"}(" + b"".join(build(key) + build(item) for key, item in value.items()) + b"u"
        case _:
            return pickle.dumps(value, 2)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments) -> bytes:
    return function + build(arguments) + b"R"


def stored(kind="FloatStorage", key="0", numel=6) -> bytes:
    return build(("storage", name("torch", kind), key, "cpu", numel)) + b"Q"


def tensor(storage=None, offset=0, shape=(2, 3), strides=(3, 1), *more) -> bytes:
    arguments = (stored() if storage is None else storage, offset, shape, strides, False, ordered({}), *more)
    return call(name("torch._utils", "_rebuild_tensor_v2"), *arguments)


def ordered(items: dict) -> bytes:
    return call(name("collections", "OrderedDict")) + build(items)[1:]  # without the dict of its own


def write_zip(folder: Path, state, storages=None, *, compression=zipfile.ZIP_STORED, file="pytorch_model.bin", **extra):
    storages = {"0": np.arange(6, dtype=np.float32).tobytes()} if storages is None else storages
    with zipfile.ZipFile(folder / file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + build(state) + b".")
        for key, value in ({"byteorder": "little", "version": "3\n"} | extra).items():
            archive.writestr(f"archive/{key}", value)
        for key, value in storages.items():
            archive.writestr(f"archive/data/{key}", value)
    return folder / file


MAGIC, VERSION, MACHINE = 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}


def old_bytes(state, storages=None, *, widths=4, small=(MAGIC, VERSION, MACHINE), keys=None, counts=None) -> bytes:
    """A file of torch before 1.6. Its storages are named with one thing more: None, or what they are a view on."""
    storages = {"0": SIX.tobytes()} if storages is None else storages
    pickles = [*small, build(state).replace(b"tQ", b"NtQ"), list(storages) if keys is None else keys]
    counts = {key: len(value) // widths for key, value in storages.items()} | (counts or {})
    return b"".join(
        [b"\x80\x02" + build(value) + b"." for value in pickles]
        + [struct.pack("<q", counts[key]) + value for key, value in storages.items()]
    )


def write_old(folder: Path, state, storages=None, *, file="pytorch_model.bin", **more) -> Path:
    (folder / file).write_bytes(old_bytes(state, storages, **more))
    return folder / file


SIX = np.arange(6, dtype=np.float32)
both = pytest.mark.parametrize("write", [write_zip, write_old])


# Every kind of file, exactly

@pytest.mark.parametrize("age", ["", "_old"])
@pytest.mark.parametrize("file", ["torch_module", "torch_views"])
def test_what_torch_wrote_comes_back_exactly(tmp_path, file, age):
    (tmp_path / "pytorch_model.bin").write_bytes((GOLDEN / f"{file}{age}.bin").read_bytes())
    found, expected = read_weights(tmp_path), np.load(GOLDEN / f"{file}.npz")
    assert list(found) == expected.files
    for key, value in found.items():
        kind = ml_dtypes.bfloat16 if "bfloat16" in key else expected[key].dtype
        same(value, expected[key].astype(kind))


@pytest.mark.parametrize("shift, kind", [(1, "FloatStorage"), (3, "BFloat16Storage"), (5, "LongStorage"),
                                         (2, "FloatStorage"), (7, "BoolStorage")])
def test_unaligned_arrays_are_copied_right(tmp_path, kind, shift):
    """In torch's files of before 1.6 and in safetensors an array may begin at any byte."""
    base = np.arange(24).astype(DTYPES[kind])
    found = tensor(stored(kind, numel=24), 0, (4, 2, 3), (6, 1, 2))
    write_old(tmp_path, {"x" * (shift + 1): found}, {"0": base.tobytes()}, widths=base.itemsize)
    value, expected = read_weights(tmp_path)["x" * (shift + 1)], base.reshape(4, 3, 2).transpose(0, 2, 1)
    copies = [jnp.array(value), value.astype(value.dtype), np.ascontiguousarray(value), value.astype(np.float32)]
    (tmp_path / "pytorch_model.bin").unlink()
    for copy in copies:
        assert not np.shares_memory(copy, value)
        np.testing.assert_array_equal(np.asarray(copy, np.float32), expected.astype(np.float32))


def test_safetensors_come_back_exactly(tmp_path):
    expected = arrays_of()
    save_file(expected, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_weights(tmp_path)
    assert found.keys() == expected.keys() and len(found) == len(expected)
    for key, value in expected.items():
        same(found[key], value)
    assert "c.weight" not in found
    with pytest.raises(ValueError, match="read-only"):
        found["ids"][0] = 1


def nested(arrays):
    tree = {}
    for key, value in arrays.items():
        *path, last = key.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = value
    return tree


def test_flax_msgpack_comes_back_exactly(tmp_path):
    many = np.arange(70_000, dtype=np.int32)  # longer than 16 bits can say
    expected = arrays_of() | {"deep.er.numpy_scalar": np.float32(3.5), "layers.0.x": many}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(nested(expected)))
    found = read_weights(tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same(found[key], np.asarray(value))


@pytest.mark.parametrize("writer", ["safetensors", write_zip, write_old])
def test_shards_come_back_as_one(tmp_path, writer):
    if writer == "safetensors":
        first, second, index = "model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"
        save_file({"a": SIX, "stray": SIX}, tmp_path / first)
        save_file({"b": SIX + 1}, tmp_path / second)
    else:
        first, second, index = "pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"
        writer(tmp_path, {"a": tensor(shape=(6,), strides=(1,))}, file=first)
        writer(tmp_path, {"b": tensor(shape=(6,), strides=(1,))}, {"0": (SIX + 1).tobytes()}, file=second)
    (tmp_path / index).write_text(json.dumps({"metadata": {}, "weight_map": {"b": second, "a": first}}))
    found = read_weights(tmp_path)
    assert list(found) == ["b", "a"]
    same(found["a"], SIX)
    same(found["b"], SIX + 1)


def test_the_order_of_the_files(tmp_path):
    def write(file, value):
        array = np.full(6, value, np.float32)
        if file.endswith(".msgpack"):
            (tmp_path / file).write_bytes(serialization.msgpack_serialize({"x": array}))
        elif file.endswith(".json"):
            shard = file.removesuffix(".index.json").replace("model", "model-00001-of-00001")
            write(shard, value)
            (tmp_path / file).write_text(json.dumps({"weight_map": {"x": shard}}))
        elif file.endswith(".bin"):
            write_zip(tmp_path, {"x": tensor(shape=(6,), strides=(1,))}, {"0": array.tobytes()}, file=file)
        else:
            save_file({"x": array}, tmp_path / file)

    order = ["model.safetensors", "model.safetensors.index.json", "flax_model.msgpack", "pytorch_model.bin",
             "pytorch_model.bin.index.json"]
    for rank, file in reversed(list(enumerate(order))):
        write(file, rank)
        assert read_weights(tmp_path)["x"][0] == rank, file


def test_no_weights(tmp_path):
    (tmp_path / "tf_model.h5").touch()
    looked_for = "model.safetensors, model.safetensors.index.json, flax_model.msgpack, pytorch_model.bin, pytorch_mod"
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"{folder} has no weights: looked for {looked_for}.*; name"):
            read_weights(folder)


@anew
@given(
    hnp.arrays(st.sampled_from("? B b h i q e f d".split()), hnp.array_shapes(min_dims=0, min_side=0, max_side=5)),
    st.sampled_from(["model.safetensors", "flax_model.msgpack"]), st.integers(0, 9),
)
def test_any_array_comes_back_exactly(tmp_path_factory, array, file, shift):
    """At any place, also where its type is not aligned."""
    array = array.view(ml_dtypes.bfloat16) if array.dtype == np.int16 and shift % 2 else array
    path = tmp_path_factory.getbasetemp() / "any"
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    before = np.zeros(shift, np.int8)
    if file == "flax_model.msgpack":
        (path / file).write_bytes(serialization.msgpack_serialize({"a": before, "b": array}))
    else:  # by hand: safetensors' own writer sorts by alignment
        end = shift + array.nbytes
        code = next(code for code, kind in weights._CODES.items() if weights._DTYPES[kind] == array.dtype)
        header = json.dumps({"a": {"dtype": "I8", "shape": [shift], "data_offsets": [0, shift]},
                             "b": {"dtype": code, "shape": array.shape, "data_offsets": [shift, end]}}).encode()
        (path / file).write_bytes(struct.pack("<Q", len(header)) + header + before.tobytes() + array.tobytes())
    same(read_weights(path)["b"], array)


@anew
@given(st.data(), st.sampled_from(sorted(DTYPES)), st.booleans())
def test_any_strides_and_offset_are_numpys(tmp_path_factory, data, kind, old):
    """Everything within the storage can be read; one element beyond it is refused."""
    folder = tmp_path_factory.getbasetemp()
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4), "shape")
    strides = data.draw(st.lists(st.integers(0, 6), min_size=len(shape), max_size=len(shape)), "strides")
    offset, spare = data.draw(st.integers(0, 5), "offset"), data.draw(st.integers(0, 2), "spare")
    reach = 0 if 0 in shape else 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    numel = offset + reach + spare
    base = (np.random.default_rng(numel).integers(0, 2, numel)).astype(DTYPES[kind])
    in_bytes = [step * base.itemsize for step in strides]

    def write(numel):
        found = {"x": tensor(stored(kind, numel=numel), offset, tuple(shape), tuple(strides))}
        if old:
            write_old(folder, found, {"0": base[:numel].tobytes()}, widths=base.itemsize)
        else:
            write_zip(folder, found, {"0": base.tobytes()})

    write(numel)
    same(read_weights(folder)["x"], np.lib.stride_tricks.as_strided(base[offset:], shape, in_bytes))
    if reach:
        write(offset + reach - 1)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read \('x' .*again"):
            read_weights(folder)


@pytest.mark.parametrize("protocol", range(1, 6))  # 0 has no persistent ids but of text, so no storages
def test_every_pickle_protocol(protocol, monkeypatch):
    """As torch.save(…, pickle_protocol=…) writes them."""

    class View:
        def __reduce__(self):
            return OrderedDict, (SIX, 0, (6,), (1,))  # stands for torch's function, which cannot be imported here

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", "FloatStorage", "0", "cpu", 6) if value is SIX else None

    file = io.BytesIO()
    Pickler(file, protocol).dump({"x": View(), "é" * 300: View()})
    monkeypatch.setitem(torch_pickle._GLOBALS, "collections.OrderedDict", lambda unpickler: torch_pickle.Tensor)
    expected = torch_pickle.Tensor(torch_pickle.Storage("float32", "0", 6), 0, (6,), (1,))
    assert torch_pickle.read_pickle(file.getvalue()) == {"x": expected, "é" * 300: expected}
    with pytest.raises(torch_pickle.Refusal, match="'y', a list"):
        torch_pickle.read_pickle(pickle.dumps({"y": [1, -(2**40), 2.5, True, None, ("b", "é")]}, protocol))


# Memory

def resident() -> int:
    """Bytes of mapped files that are in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize("file", ["model.safetensors", write_zip, write_old])
def test_nothing_is_read_before_its_use_nor_kept_after(tmp_path, file):
    arrays = {str(i): np.full((2, 2**20), i, np.float32) for i in range(4)}  # 8 MiB each
    if file == "model.safetensors":
        save_file(arrays, tmp_path / file)
    else:
        state = {key: tensor(stored(key=key, numel=2**21), 0, (2**20, 2), (1, 2**20)) for key in arrays}
        file(tmp_path, state, {key: value.tobytes() for key, value in arrays.items()})
    before = resident()
    found = read_weights(tmp_path)
    assert resident() - before < 2**20
    for key in found:
        value = found[key]
        assert value.sum() == int(key) * 2**21
        assert resident() - before < 2**23 + 2**22
        part = value[1:]
        del value
        assert resident() - before > 2**22  # a view of the view keeps it
        assert part[0, 0] == int(key)
        del part
    assert resident() - before < 2**21


def test_flax_arrays_are_freed_one_by_one(tmp_path):
    """Each has pages of its own, which go back to the system; malloc keeps memory that is freed below other memory."""
    arrays = {str(i): np.full(2**16, i, np.float32) for i in range(4)} | {"none": np.zeros((0, 2), np.float32)}
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(arrays))
    found = read_weights(tmp_path)
    for key, expected in arrays.items():
        np.testing.assert_array_equal(found[key], expected)
        part = found[key]
        while isinstance(part, np.ndarray):
            part = part.base
        pages = weakref.ref(part.obj)
        assert isinstance(pages(), mmap.mmap)
        del part, found[key]
        assert pages() is None


def test_an_array_outlives_its_file(tmp_path):
    save_file({"x": SIX}, tmp_path / "model.safetensors")
    value = read_weights(tmp_path)["x"]
    (tmp_path / "model.safetensors").unlink()
    same(value, SIX)


# Malicious pickles

def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def attacks(command: str) -> dict[str, tuple[str, bytes]]:
    """Name: what it asks for, opcodes that leave something on the stack and run the command on the way."""
    run, code = build(command), f"__import__('os').system({command!r})"
    line = f"S{command!r}\n".encode()
    state = (name("os", "system"), (command,), {}, None)
    return {
        "global": ("os.system", call(name("os", "system"), command)),
        "global of protocol 0": ("os.system", b"cos\nsystem\n(" + line + b"tR"),
        "stack_global": ("os.system", short("os") + short("system") + b"\x93" + build((command,)) + b"R"),
        "inst": ("os.system", b"(" + line + b"ios\nsystem\n"),
        "obj": ("os.system", b"(" + name("os", "system") + run + b"o"),
        "newobj": ("subprocess.Popen", name("subprocess", "Popen") + build(([*command.split()],)) + b"\x81"),
        "eval": ("builtins.eval", call(name("builtins", "eval"), code)),
        "eval of Python 2": ("__builtin__.eval", call(name("__builtin__", "eval"), code)),
        "dotted": ("collections.abc.sys.modules", short("collections") + short("abc.sys.modules") + b"\x93"),
        "setstate": ("functools.partial", call(name("functools", "partial"), name("builtins", "print"))
                     + build(state) + b"b" + b")R"),
        "getattr": ("builtins.getattr", call(call(name("builtins", "getattr"), b"cos\npath\n", "join"), "a")),
        "torch's own": ("torch.hub.load", call(name("torch.hub", "load"), command)),
        "a storage of another module": ("os.FloatStorage", name("os", "FloatStorage")),
    }


KINDS = list(attacks(""))
WRAPS = {
    "alone": lambda payload: payload,
    "as a value": lambda payload: {"x": tensor(), "y": payload},
    "in an OrderedDict": lambda payload: ordered({"x": tensor(), "y": ordered({"z": (1, [payload])})}),
    "as a tensor's hooks": lambda payload: {"x": call(name("torch._utils", "_rebuild_parameter"), tensor(), payload)},
    "as a storage": lambda payload: {"x": tensor(payload)},
    "in the metadata": lambda payload: ordered({"x": tensor()}) + build({"_metadata": payload}) + b"b",
    "before it is dropped": lambda payload: payload + b"0" + build({"x": tensor()}),
}


REFUSED = r"(asks for {}: .* open it with torch|is not a pickle of tensors by name: save)"


@both
@pytest.mark.parametrize("kind, wrap", [*((kind, "alone") for kind in KINDS), *(("global", wrap) for wrap in WRAPS),
                                        *(("eval", wrap) for wrap in WRAPS)])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(tmp_path, kind, wrap, write):
    target = tmp_path / "pwned"
    asked, payload = attacks(f"touch {target}")[kind]
    write(tmp_path, WRAPS[wrap](payload))
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin {REFUSED.format(asked)}") as error:
        read_weights(tmp_path)
    assert not target.exists() and str(tmp_path) in str(error.value)


PLAIN = {  # what is no part of the old file's small pickles and of its list of keys
    "collections.OrderedDict": ordered({"a": 1}), "torch.FloatStorage": name("torch", "FloatStorage"),
    "torch._utils._rebuild_tensor_v2": name("torch._utils", "_rebuild_tensor_v2") + b"0",
}


@pytest.mark.parametrize("kind", ["global", "inst", *PLAIN])
@pytest.mark.parametrize("at", ["magic", "before the magic", "version", "machine", "in the machine", "keys", "in keys"])
def test_the_old_files_other_pickles_may_ask_for_nothing(tmp_path, kind, at):
    """Not even for what a state dict may ask for."""
    target = tmp_path / "pwned"
    asked, payload = (attacks(f"touch {target}") | {key: (key, value) for key, value in PLAIN.items()})[kind]
    small, keys = [MAGIC, VERSION, MACHINE], ["0"]
    match at:
        case "magic":
            small[0] = build(MAGIC) + payload
        case "before the magic":
            small[0] = payload + build(MAGIC)
        case "version":
            small[1] = payload
        case "machine":
            small[2] = payload
        case "in the machine":
            small[2] = MACHINE | {"type_sizes": [payload]}
        case "keys":
            keys = payload
        case "in keys":
            keys = ["0", payload]
    whole = write_old(tmp_path, {"x": tensor()}, small=small, keys=keys).read_bytes()
    refusal = REFUSED.format(asked)
    if torch_pickle.MAGIC not in whole[:32]:  # without the magic number it is taken for a zip
        refusal = "cannot be read .*zip"
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin {refusal}"):
        read_weights(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("at", range(4))
def test_the_old_files_other_pickles_name_no_storage(tmp_path, at):
    pickles = [MAGIC, VERSION, MACHINE, ["0"]]
    pickles[at] = build(pickles[at]) + build(("storage", "0", "0", "cpu", 6)) + b"Q"
    write_old(tmp_path, {"x": tensor()}, small=pickles[:3], keys=pickles[3])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (cannot be read|is not in version 1001)"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kind", ["global", "global of protocol 0", "stack_global", "inst", "obj", "eval", "setstate"])
def test_the_attacks_are_real(tmp_path, kind):
    """Python's own pickle falls for them, else the test above would show nothing."""
    target = tmp_path / "pwned"
    pickle.loads(b"\x80\x02" + attacks(f"touch {target}")[kind][1] + b".")
    assert target.exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        name("torch", "device") + build({"__name__": "x"}) + b"b",  # would write into this module's function
        name("torch._utils", "_rebuild_tensor_v2") + build({"shape": 1}) + b"b",
        tensor() + build((None, {"shape": (9,)})) + b"b",
        build([1]) + build({}) + b"b",
        name("collections", "OrderedDict") + build({"fromkeys": 1}) + b"b",
        b"\x82\x01",  # EXT1: whatever this process has registered
        b"Pwords\n",  # PERSID
        b"\x96" + struct.pack("<Q", 2**40),  # BYTEARRAY8 of a tebibyte
        name("torch._utils", "_rebuild_tensor_v2") + build((1, 2, 3, 4)) + b"\x81",  # NEWOBJ
    ],
)
@both
def test_other_instructions_are_refused(tmp_path, opcodes, write):
    write(tmp_path, {"x": opcodes})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*(save|again)"):
        read_weights(tmp_path)
    write(tmp_path, {"x": tensor()})
    same(read_weights(tmp_path)["x"], SIX.reshape(2, 3))  # nothing was changed for the next file


@pytest.mark.parametrize("opcodes", [b"Nr\xff\xff\xff\x7f", b"Np999999999\n", b"T\xff\xff\xff\x7f",
                                     b"\x8b\xff\xff\xff\x7f", b"X\0\0\0\4", b"\x95" + struct.pack("<Q", 2**26),
                                     b"V", b"c", b"S'"])
@both
def test_large_numbers_reserve_no_memory(tmp_path, opcodes, write):
    """Of memo places, texts and frames, for which C's unpickler alone would take gigabytes; and endless lines."""
    path = write(tmp_path, {"x": opcodes})
    with open(path, "r+b") as file:
        file.truncate(2**26)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"pytorch_model\.bin "):
            read_weights(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


COPY = 2000 * b"h\1h\2\x85R"  # what is in place 1 of the memo, called with what is in place 2


@pytest.mark.parametrize("copied", [
    name("torch", "Size") + b"q\1](" + 2000 * b"K\1" + b"eq\2" + COPY,
    name("collections", "OrderedDict") + b"q\1}(" + b"".join(build(i) + b"N" for i in range(2000)) + b"uq\2" + COPY,
])
def test_copies_of_one_large_thing_do_not_take_quadratic_memory(copied):
    pickled = b"\x80\x02(" + copied + b"l."
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="copies one dict many times|is not a dict but a list"):
            torch_pickle.read_pickle(pickled)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "state, message",
    [
        ({"x": tensor(), "epoch": 3}, r"\('epoch', a int\): save the model's state_dict alone"),
        ({"state_dict": {"x": tensor()}}, r"\('state_dict', a dict\)"),
        ({1: tensor()}, r"\(a key of type int\)"),
        ({"x": tensor(stored(), 0, (2, 3), (3, 1), {"conj": True})}, r"\('x', a Tensor\)"),
        ([tensor()], "is not a dict but a list: save the model's state_dict"),
        (b"N", "is not a dict but a NoneType"),
    ],
)
@both
def test_what_is_no_state_dict_is_named(tmp_path, state, message, write):
    write(tmp_path, state)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin .*{message}"):
        read_weights(tmp_path)


# Files that lie

LIES = {
    "shape beyond the storage": tensor(shape=(3, 3)),
    "strides beyond": tensor(strides=(4, 1)),
    "offset beyond": tensor(offset=1),
    "offset far beyond": tensor(offset=2**62, shape=(), strides=()),
    "offset before": tensor(offset=-1),
    "offset no number": tensor(offset="0"),
    "shape negative": tensor(shape=(-2, 3)),
    "strides negative": tensor(offset=5, shape=(6,), strides=(-1,)),
    "strides that overflow": tensor(shape=(2, 2), strides=(2**62, 2**62)),
    "strides that wrap to zero": tensor(shape=(2,), strides=(2**64,)),
    "shape that overflows": tensor(shape=(2**32, 2**32), strides=(0, 0)),
    "shape that wraps": tensor(shape=(2**63, 2), strides=(0, 0)),
    "empty shape that overflows": tensor(shape=(0, 2**63), strides=(1, 1)),
    "too many axes": tensor(shape=(1,) * 65, strides=(1,) * 65),
    "fewer strides": tensor(strides=(1,)),
    "no strides": tensor(strides=()),
    "shape no tuple": tensor(shape="23"),
    "shape of fractions": tensor(shape=(2.0, 3.0)),
    "storage larger than its member": tensor(stored(numel=7), shape=(7,), strides=(1,)),
    "storage far larger": tensor(stored(numel=2**61), shape=(6,), strides=(1,)),
    "storage of a wider type": tensor(stored("DoubleStorage")),
    "storage negative": tensor(stored(numel=-1), shape=(0,), strides=(1,)),
    "storage absent": tensor(stored(key="1")),
    "storage elsewhere": tensor(stored(key="../../other/data/0")),
    "storage that is none": tensor(name("torch", "FloatStorage")),
}


@both
@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_that_lies_is_named(tmp_path, lie, write):
    write(tmp_path, {"fine": tensor(), "x": LIES[lie]})
    with pytest.raises(ValueError, match=r"(?s)pytorch_model\.bin cannot be read \(.*\): fetch or save"):
        read_weights(tmp_path)


@pytest.mark.parametrize("pid", [b"N", build("storage"), build(("module", "FloatStorage", "0", "cpu", 6)),
                                 build(("storage", "FloatStorage", "0", "cpu")),
                                 build(("storage", "FloatStorage", 0, "cpu", 6)),
                                 build(("storage", "FloatStorage", "0", "cpu", "6")),
                                 build(("storage", "Float", "0", "cpu", 6))])
@both
def test_a_storage_that_is_none(tmp_path, pid, write):
    write(tmp_path, {"x": tensor(pid + b"Q")})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        read_weights(tmp_path)


def test_a_storage_whose_zip_entry_lies(tmp_path):
    whole = write_zip(tmp_path, {"x": tensor()}).read_bytes()
    entry = whole.rindex(b"PK\1\2")  # of the storage, the last
    assert whole[entry + 46 :].startswith(b"archive/data/0")
    damages = {
        20: struct.pack("<II", 2**31, 2**31),  # its sizes
        42: struct.pack("<I", whole.index(b"PK\3\4") + 2),  # its place
        10: struct.pack("<H", 8),  # its compression
    }
    for place, lie in damages.items():
        damaged = bytearray(whole)
        damaged[entry + place : entry + place + len(lie)] = lie
        (tmp_path / "pytorch_model.bin").write_bytes(damaged)
        if place == 20:  # more than is told of is not used, so its numbers are right
            same(read_weights(tmp_path)["x"], SIX.reshape(2, 3))
            continue
        with pytest.raises(ValueError, match=r"pytorch_model\.bin (cannot be read|is a compressed zip)"):
            read_weights(tmp_path)
    damaged = bytearray(whole)
    damaged[entry + 20 : entry + 28] = damages[20]
    begin = damaged.index(b"archive/data.pkl") + len("archive/data.pkl")
    damaged[begin : begin + 1000] = damaged[begin : begin + 1000].replace(build(6), build(60))
    (tmp_path / "pytorch_model.bin").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        read_weights(tmp_path)


OTHER = tensor(stored(key="1"))
TWO = {"0": SIX.tobytes(), "1": SIX.tobytes()}


@pytest.mark.parametrize(
    "more, message",
    [
        ({"small": (MAGIC, VERSION, {"little_endian": False})}, "was written on a big-endian machine: save it again"),
        ({"small": (MAGIC, 1002, MACHINE)}, r"is not in version 1001 of torch's format before 1\.6: save it again"),
        ({"small": (MAGIC, VERSION, {})}, "cannot be read .*little_endian.*again"),
        ({"small": (MAGIC, VERSION, 1)}, "cannot be read .*again"),
        ({"small": (build(MAGIC) + build(1), VERSION, MACHINE)}, "is not in version 1001"),
        ({"keys": []}, r"cannot be read \(.*end at byte.*again"),
        ({"keys": ["0"]}, r"cannot be read \(.*end at byte.*again"),
        ({"keys": ["0", "0"]}, "cannot be read .*again"),
        ({"keys": ["0", "1", "0"]}, "cannot be read .*again"),
        ({"keys": ["0", "1", "2"]}, "cannot be read .*'2'.*again"),
        ({"keys": ["0", 1]}, "cannot be read .*again"),
        ({"counts": {"0": 5}}, "cannot be read .*again"),
        ({"counts": {"0": 7}}, "cannot be read .*again"),
        ({"counts": {"0": -1}}, "cannot be read .*storage '0' does not have the 6 elements.*again"),
        ({"counts": {"1": 2**62}}, "cannot be read .*storage '1' does not have the 6 elements.*again"),
        ({"counts": {"1": 5}}, r"cannot be read \(storage '1' does not have the 6 elements.*again"),
        ({"storages": TWO | {"1": SIX[1:].tobytes()}}, r"cannot be read \(storage '1' does not have.*again"),
        ({"storages": TWO | {"1": TWO["0"] + bytes(4)}}, r"cannot be read \(storage '1' does not have.*again"),
        ({"state": {"x": tensor()}}, "cannot be read .*'1'.*again"),
        ({"state": {"x": tensor(), "y": OTHER, "z": tensor(stored("IntStorage"))}}, r"cannot be read \('x' is .*again"),
        ({"state": {"x": tensor(), "y": OTHER, "z": tensor(stored(numel=5), shape=(), strides=())}},
         r"cannot be read \(storage '0' does not have the 5 elements that its tensors expect.*again"),
    ],
)
def test_an_old_file_that_lies_is_named(tmp_path, more, message):
    write_old(tmp_path, **({"state": {"x": tensor(), "y": OTHER}, "storages": TWO} | more))
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin {message}"):
        read_weights(tmp_path)


def test_an_old_files_view_on_a_storage_is_refused(tmp_path):
    view = build(("storage", name("torch", "FloatStorage"), "0", "cpu", 6, ("1", 2, 3)))
    write_old(tmp_path, {"x": tensor(view + b"q\1Q")})  # kept in the memo, so that the writer adds nothing to it
    with pytest.raises(ValueError, match=r"pytorch_model\.bin has a view on a part of a storage.*: save it with"):
        read_weights(tmp_path)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_pickle_protocol_of_an_old_file(tmp_path, protocol):
    small = b"".join(pickle.dumps(value, protocol) for value in (MAGIC, VERSION, MACHINE))
    whole = old_bytes({"x": tensor()}, small=())
    (tmp_path / "pytorch_model.bin").write_bytes(small + whole)
    same(read_weights(tmp_path)["x"], SIX.reshape(2, 3))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-lfs pointer.*git lfs pull"),
        (b"", "cannot be read .*zip.*again"),
        (b"<html>not found</html>", "cannot be read .*zip.*again"),
    ],
)
def test_other_files_under_that_name(tmp_path, content, message):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"pytorch_model\.bin {message}"):
        read_weights(tmp_path)


def test_other_zips_under_that_name(tmp_path):
    write_zip(tmp_path, {"x": tensor()}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a compressed zip.*zip it with -0"):
        read_weights(tmp_path)
    write_zip(tmp_path, {"x": tensor()}, byteorder="big")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin was written on a big-endian machine"):
        read_weights(tmp_path)
    write_zip(tmp_path, {"x": tensor()}, **{"more/data.pkl": b"N."})
    with pytest.raises(ValueError, match=r"pytorch_model\.bin .*without the one data\.pkl"):
        read_weights(tmp_path)


def safetensors_bytes(entry, size=24) -> bytes:
    header = json.dumps({"x": entry}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},  # beyond the file
        {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 20]},
        {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [7], "data_offsets": [-4, 24]},  # in the header
        {"dtype": "F32", "shape": [6], "data_offsets": [24, 0]},
        {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [6.0], "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": 6, "data_offsets": [0, 24]},
        {"dtype": "F32", "shape": [6], "data_offsets": ["0", "24"]},
        {"dtype": "F32", "shape": [6], "data_offsets": [0]},
        {"dtype": "F32", "shape": [6]},
        {"dtype": ["F32"], "shape": [6], "data_offsets": [0, 24]},
        [],
    ],
)
def test_a_safetensors_header_that_lies_is_named(tmp_path, entry):
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(entry))
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*\): fetch or save it again"):
        read_weights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"123", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 0),
                                     struct.pack("<Q", 4) + b"{ ha", struct.pack("<Q", 2) + b"[]",
                                     struct.pack("<Q", 50_000) + b"[" * 50_000, b"<html>not found</html>"])
def test_safetensors_without_a_header(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*: fetch or save it again"):
        read_weights(tmp_path)


def test_types_that_numpy_lacks_are_named(tmp_path):
    entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(entry, 4))
    with pytest.raises(ValueError, match=r"model\.safetensors has 'x' as F8_E4M3, not as one of .*: save it as"):
        read_weights(tmp_path)


def packed(*triple, code=1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb(triple))


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"a": {"x": packed([3], "float32", bytes(8))}}, "cannot be read .*reshape.*again"),
        ({"a": {"x": packed([2**32, 2**32], "float32", b"")}}, "cannot be read .*again"),
        ({"a": {"x": packed([2], "float32")}}, "cannot be read .*again"),
        ({"a": {"x": packed([2], "float32", bytes(8), 1)}}, "cannot be read .*again"),
        ({"a": {"x": packed([2], "object", bytes(16))}}, r"has an array of object, not of one of .*: save it as"),
        ({"a": {"x": packed(1.0, 2.0, code=2)}}, "cannot be read .*again"),  # complex
        ({"a": {"x": 3}}, r"has 'a\.x' .*\(int\): save the params alone"),
        ({"a": {"x": [packed([], "float32", bytes(4))]}}, r"has 'a\.x' .*\(list\)"),
        ({"a": {"x": packed([], "bool", b"1")}, "a.x": packed([], "bool", b"0")}, r"has 'a\.x' twice"),
        ([1], "cannot be read .*again"),
        ({"x": {"__msgpack_chunked_array__": True, "shape": {"0": 3}}}, r"has 'x\..* not as an array"),
    ],
)
def test_a_msgpack_that_lies_is_named(tmp_path, tree, message):
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    with pytest.raises(ValueError, match=rf"flax_model\.msgpack {message}"):
        read_weights(tmp_path)


def test_maps_without_end(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"\x81\xa1a" * 100_000)
    with pytest.raises(ValueError, match=r"flax_model\.msgpack cannot be read"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "index, error, message",
    [
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}, FileNotFoundError,
         r"model-2\.safetensors, where model\.safetensors\.index\.json has 'b', is missing: fetch it"),
        ({"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}, ValueError,
         r"index\.json has 'b' in model-1\.safetensors, which lacks it: fetch"),
        ({"weight_map": {"a": "cut.safetensors"}}, ValueError, r"cut\.safetensors cannot be read .*again$"),
        ({"weight_map": {"a": "../model-1.safetensors"}}, ValueError,
         r"index\.json has 'a' in '\.\./model-1\.safetensors', which is not the name of a file beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, ValueError, r"index\.json has 'a' in '/etc/passwd', which is not"),
        ({"weight_map": {"a": 3}}, ValueError, r"index\.json has 'a' in 3, which is not the name of a file"),
        ({"weights": {}}, ValueError, r"index\.json cannot be read .*again"),
        ([], ValueError, r"index\.json cannot be read .*again"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path, index, error, message):
    save_file({"a": SIX}, tmp_path / "model-1.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model-1.safetensors").read_bytes()[:-1])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=message):
        read_weights(tmp_path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder, arrays = tmp_path_factory.mktemp("whole"), arrays_of()
    save_file(arrays, folder / "model.safetensors")
    return {
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "flax_model.msgpack": serialization.msgpack_serialize(nested(arrays)),
        "pytorch_model.bin": (GOLDEN / "torch_views.bin").read_bytes(),
        "pytorch_model.bin, old": (GOLDEN / "torch_views_old.bin").read_bytes(),
    }


FILES = ["model.safetensors", "flax_model.msgpack", "pytorch_model.bin", "pytorch_model.bin, old"]


@pytest.mark.parametrize("file", FILES)
def test_a_cut_file_is_refused_wherever_it_was_cut(tmp_path, whole_files, file):
    whole, file = whole_files[file], file.split(",")[0]
    for length in range(0, len(whole), 13 if file == "model.safetensors" else 29):
        (tmp_path / file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{file} .*again"):
            read_weights(tmp_path)


@anew
@given(st.data(), st.sampled_from(FILES))
def test_a_damaged_file_is_read_within_its_bytes_or_refused(tmp_path_factory, whole_files, data, file):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    damaged, file = bytearray(whole_files[file]), file.split(",")[0]
    for _ in range(data.draw(st.integers(1, 4), "count")):
        damaged[data.draw(st.integers(0, len(damaged) - 1), "place")] = data.draw(st.integers(0, 255), "byte")
    (folder / file).write_bytes(damaged)
    try:
        found = read_weights(folder)
    except ValueError as error:
        assert str(folder / file) in str(error)
        return
    for value in found.values():
        if value.size:
            ends = value[(0,) * value.ndim], value[tuple(n - 1 for n in value.shape)]
            assert all(end.dtype == value.dtype for end in ends)

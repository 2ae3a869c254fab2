"""One run of training for a process of its own: what test_resume.py kills and test_processes.py starts twice.

`start` hands it to Python's fork server, which has imported all this once; JAX's devices are made after the fork.
"""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tarfile
import threading
import time
from contextlib import closing, contextmanager
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import tiny
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from PIL import Image
from tiny import KEYWORDS, NAMES, tiny_clip, tiny_pairs

from clipid_utils.data.batches import loader
from clipid_utils.data.batches.loader import records_feed, stream_feed
from clipid_utils.data.batches.prefetch import Steps
from clipid_utils.data.batches.streams import tar_stream
from clipid_utils.data.captions import read_captions, write_captions
from clipid_utils.training import checkpoint
from clipid_utils.training.checkpoint import Checkpoints
from clipid_utils.training.distributed import jit_form, make_mesh
from clipid_utils.training.fit import FitConfig, fit

STEPS, BATCH, COUNT, LARGER = 18, 8, 24, 24
# Three steps an epoch: lines at 3, 6, 9, …, evaluations at 6, 12, 18, checkpoints at 4, 8, 12, 16, 18. Some captions
# are longer than 6 tokens, so that an alarm rings.
CONFIG = FitConfig(
    steps=STEPS, batch_size=BATCH, learning_rate=3e-3, caption_tokens=6, drop_path=0.2, evaluate_every=2, log_every=3,
    checkpoint_every=4, average_decay=0.9,
)


@contextmanager
def cached_in(folder: Path):
    """This folder gets the files that `datasets` makes of records."""
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, folder
    yield
    datasets.config.HF_DATASETS_CACHE = before


@contextmanager
def data_in(folder: Path):
    """The folder with the pictures in it, and what `datasets` makes of them."""
    write_data(folder)
    with cached_in(folder / "cache"):
        yield folder


def write_data(folder: Path) -> None:
    """The same pictures as captions records and as two tars, JPEGs of several sizes."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(COUNT):
        pixels = np.kron(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), np.ones((8 + number % 3, 8, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{number:02d}.jpg", quality=95)
        concept = number % len(NAMES)
        rows.append({"image_path": f"{number:02d}.jpg", "captions": [NAMES[concept], ", ".join(KEYWORDS[concept])]})
    write_captions(rows, folder / "captions.jsonl")
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                caption = json.dumps({"captions": rows[number]["captions"]}).encode()
                for name, content in ((f"{number:02d}.jpg", (folder / f"{number:02d}.jpg").read_bytes()),
                                      (f"{number:02d}.json", caption)):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def make_feed(kind: str, data: Path | None, processor):
    """The pairs in memory, or a feed of the records or the tars of `data`, and the config to it."""
    if kind == "dictionary":
        return tiny_pairs(COUNT, LARGER), CONFIG
    options = {"seed": 0, "length": CONFIG.caption_tokens}
    if kind == "records":
        records = read_captions(data / "captions.jsonl")
        return records_feed(records, processor.tokenize, LARGER, BATCH, **options), CONFIG
    stream = tar_stream(sorted(data.glob("*.tar")))
    feed = stream_feed(stream, processor.tokenize, LARGER, BATCH, shuffle_window=10, **options)
    return feed, dataclasses.replace(CONFIG, evaluate_every=6)


def around(wrap, form=jit_form):
    """A form of the step in which `wrap` gets the `Placed` step and returns another."""
    return lambda make_update, mesh: wrap(form(make_update, mesh))


def at_step(number: int, act):
    """For `around`: calls `act()` when step `number` has been computed and before the loop has heard of it."""

    def wrap(placed):
        def step(state, batch):
            done = int(np.asarray(state.step).max()) + 1
            result = jax.block_until_ready(placed.step(state, batch))
            if done == number:
                act()
            return result

        return placed._replace(step=step)

    return wrap


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_some_time() -> None:
    """At a moment of the next second and a half, when 18 steps of a tenth of a second are not over."""
    seconds = random.SystemRandom().uniform(0, 1.5)
    print(f"killed {seconds:.3f} seconds after its first step", flush=True)
    threading.Timer(seconds, die).start()


def slowly(placed):
    """For `around`: each step takes a tenth of a second more."""

    def step(state, batch):
        time.sleep(0.1)
        return placed.step(state, batch)

    return placed._replace(step=step)


def wait() -> None:
    """For SIGTERM, as a long step would be met by it, also where it comes at once."""
    met, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *seen: (met.append(seen), before(*seen)))
    print("waiting", flush=True)
    while not met:
        time.sleep(0.01)
    signal.signal(signal.SIGTERM, before)


def die_in_save(number: int, point: str) -> None:
    """From here on: killed in the save of step `number`, whose folder is made ("begun"), whose arrays are there
    ("written"), or which is whole but for its name ("sealed")."""
    sealed, save, finalize = checkpoint._Sealed, checkpoint._Sealed.async_save, checkpoint._Sealed.finalize

    async def async_save(self, directory, *args, **options):
        if point == "begun":
            die()
        return await save(self, directory, *args, **options)

    def finalize_and_die(self, directory):
        last = f"/{number}." in str(directory)  # the save before may not be over yet
        if point == "sealed" or not last:
            finalize(self, directory)
        if last:
            die()

    sealed.async_save, sealed.finalize = async_save, finalize_and_die


def die_in_best() -> None:
    """From here on: killed before the next JSON file beside the best weights takes its name."""
    replace = os.replace

    def die_before_replacing(source, target):
        if "best" in Path(target).parts and Path(target).suffix == ".json":
            die()
        replace(source, target)

    os.replace = die_before_replacing


def train(
    out: Path, kind: str = "dictionary", data: Path | None = None, *, resume: bool = False,
    stopped: tuple[str, int] | None = None,
) -> None:
    """A run, or the rest of one; `stopped` says how and by which step it is killed, or waits for a signal."""
    how, step = stopped or ("", 0)
    form = around(at_step(1, die_some_time), around(slowly)) if how == "time" else jit_form
    known = {"": None, "time": None, "step": die, "best": die_in_best, "wait": wait}
    act = known.get(how, lambda: die_in_save(step, how))
    clip = tiny_clip()
    with cached_in(out.parent / "cache"):
        feed, config = make_feed(kind, data, clip[1])
    fit(*clip, feed, tiny_pairs(), config, seed=0, out=out, resume=resume, progress=False, mesh=make_mesh(1),
        form=around(at_step(0 if how == "time" else step, act), form))


def noise(step: int, count: int = 1000) -> dict:
    """A state that zstd cannot shrink, made of its step alone."""
    rng = np.random.default_rng(step)
    return {"w": jnp.asarray(rng.random(count, np.float32)), "step": jnp.int32(step), "key": jax.random.key(step)}


def save_and_die(folder: Path, point: str) -> None:
    """Saves step 1, and is killed at `point` of the save of step 2."""
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(1, noise(1))
    checkpoints.wait()
    die_in_save(2, point)
    checkpoints.save(2, noise(2))
    checkpoints.wait()


def share_a_checkpoint(folder: Path, rank: int, port: int) -> None:
    """One of two processes that save and restore arrays that are spread over both, each with its share of the data."""
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    connect()
    mesh = make_mesh()

    def place(x, *spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda at: x[at])

    def half():
        return iter(Steps(lambda step: {"rows": np.arange(8 * step + 4 * rank, 8 * step + 4 * rank + 4)}))

    def rows(data):
        return np.stack([next(data)["rows"] for _ in range(9)])

    state = {"w": place(np.arange(32, dtype=np.float32).reshape(8, 4), "data"), "b": place(np.ones(3, np.float32))}
    data = half()
    next(data)
    with closing(Checkpoints(folder, keep=1)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, data=data, extra={"step": step})
        rest, again = rows(data), half()
        restored, extra = checkpoints.restore(state, data=again)
        assert checkpoints.latest() == 2 and extra == {"step": 2}
        assert (rows(again) == rest).all() and rest[0, 0] == 8 + 4 * rank
        for name, leaf in state.items():
            for one, other in zip(leaf.addressable_shards, restored[name].addressable_shards, strict=True):
                assert (np.asarray(one.data) == np.asarray(other.data)).all()


def small(data: Path, **share):
    """A model of one layer a tower, a feed of the records for it, and a config without augmentation: each process has
    to compile it anew."""
    towers = {side: dataclasses.replace(getattr(tiny.CONFIG, side), layers=1) for side in ("vision", "text")}
    clip, config = tiny_clip(**towers), dataclasses.replace(CONFIG, augmentation=None, keep_patches=3)
    records, length = read_captions(data / "captions.jsonl"), config.caption_tokens
    return clip, records_feed(records, clip[1].tokenize, tiny.SIZE, BATCH, seed=0, length=length, **share), config


def connect() -> None:
    """Right after `jax.distributed.initialize`: the processes' first exchanges, between one device of each and between
    all of them. JAX gives each of the two 30 seconds, which is no setting and on a busy machine less than the
    compilation of a step may take one process longer than the other; later ones wait as long as it takes."""
    mesh = make_mesh()  # all wait here for all
    multihost_utils.process_allgather(np.int32(0))
    rows = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, P("data")), lambda at: np.ones(1))
    jax.block_until_ready(jax.jit(jnp.sum)(rows))


def train_share(
    out: Path, data: Path, notes: Path, port: int, rank: int, count: int, *, resume: bool = False,
    signals: dict[int, tuple[int, int]] | None = None, samples: tuple[str, ...] = (),
) -> None:
    """One process's part of a run with captions records: all devices of all `count` processes are one mesh.

    `signals` says for a rank after which step it gets which signal; steps are slow from there on, so that the word can
    go round. `notes` says which files it opened and how it ended.
    """
    jax.distributed.initialize(f"localhost:{port}", count, rank)
    connect()
    loader.usable_threads = lambda: 1  # one picture after the other
    read, write = record_files(out)
    with cached_in(notes.parent / f"cache-{rank}"):
        clip, feed, config = small(data, process_index=rank, process_count=count)
    step, number = (signals or {}).get(rank, (0, 0))
    first = min((at for at, _ in (signals or {}).values()), default=STEPS)
    form = around(lambda placed: placed._replace(step=slow(placed.step, first)))
    form = around(at_step(step, lambda: signal.raise_signal(number)), form)
    result = fit(*clip, feed, tiny_pairs(), config, seed=0, out=out, resume=resume, progress=False, form=form,
                 samples=samples)
    notes.write_text(json.dumps({
        "read": read, "written": sorted(write), "interrupted": result.interrupted, "devices": jax.device_count(),
        "history": len(untimed(result.history)),
    }))


def slow(step, first: int):
    def waiting(state, batch):
        result = jax.block_until_ready(step(state, batch))
        if int(np.asarray(result[0].step)) > first:
            time.sleep(1)
        return result

    return waiting


def record_files(out: Path) -> tuple[list[str], set[str]]:
    """From here on: the names of the pictures that are opened, in their order, and of the files under `out`, without
    checkpoints, that are opened to be written."""
    read, write = [], set()

    def watch(event, args):
        if event != "open" or not isinstance(args[0], str | Path):
            return
        path, changes = Path(args[0]), args[2] & (os.O_WRONLY | os.O_RDWR)
        if path.suffix == ".jpg" and not changes:
            read.append(path.stem)
        if changes and path.is_relative_to(out) and not path.is_relative_to(out / "checkpoints"):
            write.add(path.relative_to(out).as_posix())

    sys.addaudithook(watch)
    return read, write


def _main(log: Path, devices: int, run, args, options) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    run(*args, **options)
    print("CPU", time.process_time())


@contextmanager
def free_port():
    """A port that no other program gets meanwhile; JAX's coordinator, which shares it, may listen there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


class Process:
    """`run(*args, **options)` in a process of its own on so many devices; what it prints goes to the file `log`."""

    def __init__(self, run, *args, log: Path, devices: int = 1, **options):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["resume_worker"])
        # The server passes over what it cannot import, and Python 3.11 does not tell it of pytest's sys.path
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
            forkserver.ensure_running()
        self.log = log
        self.process = context.Process(target=_main, args=(log, devices, run, args, options), daemon=True)
        self.process.start()

    def output(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def ends(self, code: int, timeout: float = 600) -> str:
        """Its output, once it has ended with this exit code."""
        self.process.join(timeout)  # no judgement of its speed: a process that hangs ends the test
        text = self.output()
        if self.process.exitcode != code:
            ended = self.process.exitcode
            self.process.kill()
            raise AssertionError(f"the process ended with {ended}, not {code}:\n{text[-6000:]}")
        return text

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


# --- What a run leaves behind --------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what the clock says."""
    return untimed([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])


def untimed(history: list[dict]) -> list[dict]:
    """Without the times, which differ in each process."""
    timed = ("examples_per_second", "data_wait_fraction")
    return [{key: value for key, value in line.items() if key not in timed}
            for line in history if line.get("alarm") != "data_wait"]


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint by their names: parameters, average, optimizer, step, key."""
    with closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        notes = last_notes(folder)
        like = {name: _shape(text) for name, text in notes["leaves"].items()}
        restored, _ = checkpoints.restore(like)
    return {name: np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
            for name, leaf in restored.items()}


def _shape(text: str) -> jax.ShapeDtypeStruct:
    """Of "float32[2, 3]"."""
    kind, _, sides = text.rstrip("]").partition("[")
    dtype = jax.random.key(0).dtype if kind.startswith("key") else jnp.dtype(kind)
    return jax.ShapeDtypeStruct([int(side) for side in sides.split(",") if side], dtype,
                                sharding=SingleDeviceSharding(jax.devices()[0]))


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder."""
    there = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else []
    return sorted(int(path.name) for path in there if path.name.isdecimal())


def last_notes(folder: Path) -> dict:
    """The notes beside the arrays of the last checkpoint: place in the data, counts, best recall."""
    return json.loads((folder / "checkpoints" / str(steps(folder)[-1]) / "run.json").read_text())


def assert_same_run(one: Path, other: Path) -> None:
    """Bit for bit: the last state, the data's place, the best weights, the lines of the log."""
    assert steps(one) == steps(other)
    ours, theirs = last_notes(one), last_notes(other)
    assert ours["data"] == theirs["data"] and ours["extra"]["truncated"] == theirs["extra"]["truncated"]
    ours, theirs = last_state(one), last_state(other)
    for name, value in theirs.items():
        assert ours[name].tobytes() == value.tobytes(), name
    for line, expected in zip(lines(one), lines(other), strict=True):
        assert line == expected, (line, expected)
    assert (one / "best" / "model.safetensors").read_bytes() == (other / "best" / "model.safetensors").read_bytes()

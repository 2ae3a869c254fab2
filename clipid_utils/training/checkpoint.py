"""Training states on disk, through Orbax: written behind the training, whole or not at all, restored on any devices.

A checkpoint is the folder `<folder>/<step>`. It gets that name only when all is written, so that a kill, a full disk or
an error on the way leaves the ones before it as they were. Orbax writes the arrays, each process its own part; beside
them stand `run.json` (the names and shapes of the leaves, where each process was in the data, what the caller adds) and
`checksums.json`, since a changed byte inside an array would otherwise be read as a weight.
"""

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from grain import DatasetIterator
from jax.experimental import multihost_utils

ITEM = "state"


def _quiet(record: logging.LogRecord) -> bool:
    """Of Orbax's lines only the errors, and of those not the five tracebacks a failed save has: it raises them too."""
    if "orbax" in record.pathname:
        record.exc_info = None
        return record.levelno >= logging.ERROR
    return True


logging.getLogger("absl").addFilter(_quiet)
# Of a failed save asyncio says the same of each array, up to thousands of lines, after the error that `save` raised
logging.getLogger("asyncio").addFilter(lambda record: "OCDBT database" not in record.getMessage())


def _is_key(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(tree) -> dict[str, Any]:
    """The leaves by their paths, as "params.text.embed.value"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _describe(leaf) -> str:
    """Type and shape in a word: "float32[512, 128]"."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def _everyone(text: str) -> list[str]:
    """The texts of all processes, in their order; all of them must call it."""
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(raw))).max())
    rows = multihost_utils.process_allgather(np.pad(raw, (0, longest - len(raw))))
    return [row.tobytes().rstrip(b"\0").decode() for row in rows]


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint, in a sentence that names the file; "" where nothing is."""
    sums = folder / ITEM / "checksums.json"
    try:
        expected = json.loads(sums.read_text())
        for name, checksum in expected.items():
            if _checksum(folder / ITEM / name) != checksum:
                return f"{folder / ITEM / name} is truncated or changed"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{sums} cannot be read ({error})"
    return ""


def _compare(step_folder: Path, there: dict[str, str], here: dict[str, str]) -> None:
    """Raises ValueError where the leaves of a checkpoint are not the ones asked for."""
    differing = [name for name in here | there if here.get(name) != there.get(name)]
    if differing:
        shown = "; ".join(f"{name} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
                          for name in differing[:3])
        rest = len(differing) - 3
        more = f"; and {rest} more {'leaf' if rest == 1 else 'leaves'}" if rest > 0 else ""
        raise ValueError(f"{step_folder} holds the state of another model or optimizer: {shown}{more}. Resume with the "
                         "model, optimizer and settings that wrote it, or start anew in another folder")


def _position(step_folder: Path, states: list | None) -> Any:
    """This process's iterator state out of those of all processes that wrote."""
    if states is None:
        raise ValueError(f"{step_folder} holds no place in the data, it was saved without `data`: restore it without")
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    # Where it is the number of the next batch alone, it is the same however many share the batch
    if set(states[0]) == {"step"} and all(state == states[0] for state in states):
        return states[0]
    raise ValueError(f"{step_folder} was written by {len(states)} processes, each at its own place in the data, and "
                     f"cannot go on with {jax.process_count()}: resume with {len(states)} processes")


class _Sealed(ocp.StandardCheckpointHandler):
    """Orbax's writer of arrays; before the folder gets its name it adds `run.json` and the checksums of all files."""

    notes = ""  # of the save under way; Checkpoints lets no second one begin

    def finalize(self, directory) -> None:
        super().finalize(directory)
        root = Path(directory)
        (root / "run.json").write_text(self.notes, encoding="utf-8")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        sums = {path.relative_to(root).as_posix(): _checksum(path) for path in files}
        (root / "checksums.json").write_text(json.dumps(sums, indent=1))


class Checkpoints:
    """The training states of one run, in `folder`: the last `keep` and no half-written one.

    One run writes to a folder at a time; any number may read. With several processes all of them make the same calls,
    on one folder that all of them see. As a context manager it closes at the end. Raises OSError where the folder
    cannot be made.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        self.folder, self.keep = Path(folder).absolute(), keep
        self._sealed = _Sealed()
        self._manager: ocp.CheckpointManager | None = None
        self._swept = False
        self._own: int | None = None  # the step last saved or restored here
        self._writing: int | None = None
        self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except OSError as unwritten:
            if error is None:
                raise
            error.add_note(str(unwritten))  # the first error is the one to see

    def save(self, step: int, state, *, data: DatasetIterator | None = None, extra: dict | None = None) -> None:
        """Copies the state, and writes it behind the training; `extra` is JSON, as `restore` gives it back.

        The state's memory may be given away at once. A step that this object saved or restored last is not written
        again. Raises OSError when the save before this one failed (nothing is lost then but that save; the call may be
        repeated) and ValueError where the folder holds later steps.
        """
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            if step == self._own:
                return
            raise ValueError(f"{self.folder} holds step {latest} of another or an earlier run, and step {step} "
                             "does not come after it: delete the folders of the later steps, or name another folder")
        manager = self._open()
        self._sweep()
        manager.reload()  # what lies there now counts, whoever deleted a folder
        leaves = _named(state)
        keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in leaves.items() if _is_key(leaf)}
        position = None if data is None else [json.loads(text) for text in _everyone(json.dumps(data.get_state()))]
        self._sealed.notes = json.dumps({"leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
                                         "keys": keys, "data": position, "extra": extra or {}}, indent=1)
        arrays = {name: jax.random.key_data(leaf) if name in keys else leaf for name, leaf in leaves.items()
                  if leaf.size}  # Orbax writes no empty array
        self._writing = step
        self._try(lambda: manager.save(
            step, args=ocp.args.Composite(**{ITEM: ocp.args.StandardSave(arrays)}), force=True
        ))

    def latest(self) -> int | None:
        """The step of the last whole checkpoint; None without one."""
        steps = self._steps()
        latest = np.int32(steps[-1] if steps else -1)
        if jax.process_count() > 1:  # a shared folder need not look the same to all at once
            latest = multihost_utils.broadcast_one_to_all(latest)
        return None if latest < 0 else int(latest)

    def restore(
        self, like, *, data: DatasetIterator | None = None, step: int | None = None
    ) -> tuple[Any, dict]:
        """The state of `step`, the last one by default, as `(state, extra)`; `data` is set to where it was.

        `like` is a tree of arrays or jax.ShapeDtypeStructs with shardings: the result has its structure and lies where
        it says, however many devices and processes wrote it. Raises FileNotFoundError without a checkpoint, ValueError
        where its leaves are not those of `like`, OSError where a file of it is damaged.
        """
        self.wait()
        step = self.latest() if step is None else step
        if step is None or step not in self._steps():
            raise FileNotFoundError(f"{self.folder} holds no checkpoint{'' if step is None else f' of step {step}'}")
        step_folder = self.folder / str(step)
        self._check(step)
        run = json.loads((step_folder / ITEM / "run.json").read_text(encoding="utf-8"))
        wanted = _named(like)
        _compare(step_folder, run["leaves"], {name: _describe(leaf) for name, leaf in wanted.items()})
        position = None if data is None else _position(step_folder, run["data"])
        somewhere = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = {name: getattr(leaf, "sharding", None) or somewhere for name, leaf in wanted.items()}
        stored = {
            name: jax.eval_shape(jax.random.key_data, leaf) if name in run["keys"] else leaf
            for name, leaf in wanted.items() if leaf.size
        }
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[name])
                  for name, leaf in stored.items()}
        arrays = self._open().restore(step, args=ocp.args.Composite(**{ITEM: ocp.args.StandardRestore(target)}))[ITEM]
        for name, leaf in wanted.items():
            if name in run["keys"]:
                arrays[name] = jax.random.wrap_key_data(arrays[name], impl=run["keys"][name])
            elif not leaf.size:
                arrays[name] = jnp.zeros(leaf.shape, leaf.dtype)
            arrays[name] = jax.device_put(arrays[name], places[name])
        if data is not None:
            data.set_state(position)
        self._own = step
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted]), run["extra"]

    def wait(self) -> None:
        """Returns when the save under way is on disk; raises OSError where it failed."""
        if self._writing is not None:
            self._try(self._open().wait_until_finished)
            self._own, self._writing = self._writing, None

    def close(self) -> None:
        """Waits, and lets Orbax's threads go; raises OSError where the last save failed."""
        try:
            self.wait()
        finally:
            self._drop()

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"{self.folder} cannot be made ({error}): name another folder for checkpoints") from error
            registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
            registry.add(ITEM, ocp.args.StandardSave, self._sealed)
            registry.add(ITEM, ocp.args.StandardRestore, self._sealed)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(n=self.keep),
                # Made behind the training, a folder that cannot be made leaves threads that wait ten minutes for it
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=registry)
        return self._manager

    def _drop(self) -> None:
        """Closes Orbax's manager; after a failure the next call needs a new one, since each of its threads raises."""
        manager, self._manager = self._manager, None
        for _ in range(8 if manager else 0):
            try:
                return manager.close()
            except Exception as error:
                logging.getLogger(__name__).debug("left over from the failed save: %s", error)

    def _steps(self) -> list[int]:
        there = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted(int(path.name) for path in there if path.name.isdecimal())

    def _check(self, step: int) -> None:
        """Raises OSError where a file of the checkpoint is not as it was written."""
        mine = _damage(self.folder / str(step)) if jax.process_index() == 0 else ""
        damage = _everyone(mine)[0]
        if damage:
            before = [other for other in self._steps() if other < step]
            then = f"goes on from step {before[-1]}" if before else "starts from the beginning, since none is before it"
            raise OSError(f"{damage}: delete the folder {self.folder / str(step)}; the run then {then}")

    def _try(self, act: Callable[[], Any]) -> None:
        """Runs a part of a save; what goes wrong in it becomes an OSError that says what is left and what to do."""
        try:
            act()
        except Exception as error:
            step, self._writing, self._swept = self._writing, None, False
            self._drop()
            self._sweep()
            steps = self._steps()
            kept = f"the last whole one is of step {steps[-1]}" if steps else "no earlier one is there"
            code = re.search("os_error_code='([0-9]+)'", str(error))  # at the end of lines of TensorStore's settings
            cause = os.strerror(int(code[1])) if code else str(error)[:300] or type(error).__name__
            raise OSError(f"{self.folder}: the checkpoint of step {step} was not written ({cause}); {kept}. Make room "
                          "on the disk and the folder writable, and save again") from error

    def _sweep(self) -> None:
        """Deletes what a killed or failed save left half-written; before the first save, when nobody else writes."""
        if not self._swept and jax.process_index() == 0:
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        self._swept = True

"""Training states on disk, through Orbax: written while the training runs, whole or not at all, for any devices.

A checkpoint is the folder `<folder>/<step>`. It gets that name only when everything is written, so a kill, a full disk
or an error leaves the earlier ones as they were. Orbax writes the arrays, each process its own part. Beside them are
`run.json` (names and shapes of the leaves, each process's position in the data, what the caller adds) and
`checksums.json`, since Orbax would read a changed byte inside an array as a weight. Grain's checkpoint handler is not
used: it ties each position to a number of processes, and a run may resume with a different number.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from grain import DatasetIterator

from clipid_utils.training.processes import from_all, from_first

LOGGERS = ("absl", "asyncio")  # with messages about failed saves
UNSEALED = "_CHECKPOINT_METADATA"  # Orbax's file with the times of a save; it adds the last one at the end


def _named(tree) -> dict[str, Any]:
    """The leaves by their paths, as "params.text.embed.value"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _described(tree) -> dict[str, str]:
    """Type and shape of each leaf: "float32[512, 128]"."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _named(tree).items()}


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _damage(folder: Path) -> str:
    """The first file of a checkpoint that is not as it was written, in a sentence; "" if there is none."""
    sums = folder / "checksums.json"
    try:
        for name, checksum in json.loads(sums.read_text()).items():
            if _checksum(folder / name) != checksum:
                return f"{folder / name} is truncated or changed"
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"{sums} cannot be read ({error})"
    return ""


def differences(before, now, name: str = "") -> Iterator[str]:
    """The differences of two JSON values in words, as deep inside as they are; names are dotted."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before | now:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield f"{name} {before!r}, now {now!r}"


def _position(step_folder: Path, states: list) -> Any:
    """This process's position in the data, out of those of all processes that wrote the checkpoint."""
    if len(states) == jax.process_count():
        return states[jax.process_index()]
    # The number of the next batch is the same for any number of processes that share the batch
    if set(states[0]) == {"step"} and all(state == states[0] for state in states):
        return states[0]
    raise ValueError(f"{step_folder} was written by {len(states)} processes, each with its own position in the data, "
                     f"so {jax.process_count()} cannot resume it: resume with {len(states)} processes")


class _Sealed(ocp.StandardCheckpointHandler):
    """Orbax's writer of arrays; before the folder gets its name it adds `run.json` and the checksums of all files."""

    notes = ""  # of the current save; Checkpoints never starts a second one

    def finalize(self, directory) -> None:
        super().finalize(directory)
        root = Path(directory)
        (root / "run.json").write_text(self.notes, encoding="utf-8")
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != UNSEALED)
        sums = {path.relative_to(root).as_posix(): _checksum(path) for path in files}
        (root / "checksums.json").write_text(json.dumps(sums, indent=1))


@ocp.args.register_with_handler(_Sealed, for_save=True)
class _Save(ocp.args.StandardSave):
    pass


@ocp.args.register_with_handler(_Sealed, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    pass


def _no_traceback(record: logging.LogRecord) -> bool:
    """A filter for Orbax's log: a failed save has five tracebacks there, and raises the error too."""
    if "orbax" in record.pathname:
        record.exc_info = None
    return "OCDBT database" not in record.getMessage()  # asyncio repeats the error for each array, also after `close`


class Checkpoints:
    """The training states of one run in `folder`: the last `keep`, and never a half-written one.

    Only one run at a time may write to a folder; any number may read. If there are several processes, all of them make
    the same calls, and all of them see the folder. After a save that failed it can only be closed.
    """

    def __init__(self, folder: Path, *, keep: int = 3):
        self.folder, self.keep = Path(folder).absolute(), keep
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sealed = _Sealed()
        # Folders are made at once: otherwise one that cannot be made leaves threads that wait ten minutes for it
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._writer = ocp.AsyncCheckpointer(self._sealed, async_options=options)
        self._writing: int | None = None
        for name in LOGGERS:
            logging.getLogger(name).addFilter(_no_traceback)

    def save(self, step: int, state, *, data: DatasetIterator | None = None, extra: dict | None = None) -> None:
        """Copies the state, and writes it while the training runs; `extra` is JSON, which `restore` returns.

        The state's memory may be reused at once. Raises OSError if the save before this one failed, or if the folder
        has this step already.
        """
        self.wait()
        if jax.process_index() == 0:
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):  # a killed or failed save left it
                shutil.rmtree(path, ignore_errors=True)
        position = None if data is None else from_all(data.get_state())
        self._sealed.notes = json.dumps({"leaves": _described(state), "data": position, "extra": extra or {}}, indent=1)
        self._writing = step
        self._try(lambda: self._writer.save(self.folder / str(step), args=_Save(_named(state))))

    def latest(self) -> int | None:
        """The step of the last whole checkpoint; None if there is none."""
        steps = self._steps()
        return from_first(steps[-1] if steps else None)  # a shared folder may look different to each process

    def restore(self, like, *, data: DatasetIterator | None = None) -> tuple[Any, dict]:
        """The last state, and its `extra`; `data` is set to its position.

        `like` is a tree of arrays or jax.ShapeDtypeStructs with shardings; the result has its structure and shardings,
        whatever devices and processes wrote the checkpoint. Raises FileNotFoundError if there is no checkpoint,
        ValueError if its leaves are not those of `like`, and OSError if one of its files is damaged.
        """
        self.wait()
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"{self.folder} has no checkpoint")
        step_folder = self.folder / str(step)
        damage = from_first(_damage(step_folder) if jax.process_index() == 0 else "")
        if damage:
            before = self._steps()[:-1]
            then = f"resumes from step {before[-1]}" if before else "starts from the beginning, since there is no other"
            raise OSError(f"{damage}: delete the folder {step_folder}; the run then {then}")
        run = json.loads((step_folder / "run.json").read_text(encoding="utf-8"))
        changed = list(differences(run["leaves"], _described(like)))
        if changed:
            raise ValueError(f"{step_folder} has the state of a different model or optimizer: {'; '.join(changed[:3])} "
                             f"({len(changed)} differences in all). Resume with the model, optimizer and settings that "
                             "wrote it, or start again in a different folder")
        position = None if data is None else _position(step_folder, run["data"])
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                  for name, leaf in _named(like).items()}
        found = self._writer.restore(step_folder, args=_Restore(target))
        if data is not None:
            data.set_state(position)
        return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in target]), run["extra"]

    def wait(self) -> None:
        """Returns when the current save is on disk, and deletes those before the last `keep`; OSError if it failed."""
        if self._writing is not None:
            self._try(self._writer.wait_until_finished)
            self._writing = None
            for step in self._steps()[: -self.keep] if jax.process_index() == 0 else []:
                shutil.rmtree(self.folder / str(step), ignore_errors=True)

    def close(self) -> None:
        """Waits, and ends Orbax's threads; raises OSError if the last save failed."""
        try:
            self.wait()
        finally:
            for _ in range(8):  # after a failure several of its threads raise, one at each call
                with contextlib.suppress(Exception):
                    self._writer.close()
                    break

    def _steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _try(self, act: Callable[[], Any]) -> None:
        """Runs a part of a save; an error in it becomes an OSError that says what is left and what to do."""
        try:
            act()
        except Exception as error:
            step, self._writing, steps = self._writing, None, self._steps()
            kept = f"the last whole one is of step {steps[-1]}" if steps else "there is no earlier one"
            code = re.search("os_error_code='([0-9]+)'", str(error))  # at the end of lines of TensorStore's settings
            cause = os.strerror(int(code[1])) if code else str(error)[:300] or type(error).__name__
            raise OSError(f"{self.folder}: the checkpoint of step {step} was not written ({cause}); {kept}. Free space "
                          "on the disk, check that the folder can be written, and resume the run") from error

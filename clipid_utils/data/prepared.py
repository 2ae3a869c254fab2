"""A folder that is prepared once and then read from the cache."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from clipid_utils.files import whole_folder


def prepare_once(folder: Path, prepare: Callable[[Path], object]) -> Path:
    """The folder, which `prepare` fills the first time. It appears only when it is whole; a second process waits."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"preparing-{folder.name.partition('-')[0]}.lock")):
            if not folder.is_dir():
                with whole_folder(folder) as partial:
                    prepare(partial)
    return folder

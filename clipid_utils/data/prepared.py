"""A folder that is prepared once and then read from the cache."""

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from clipid_utils.files import whole_folder

NUMBER = ".recipe"  # hidden, so that nothing takes it for a picture or a record


def prepare_once(folder: Path, prepare: Callable[[Path], object], number: str = "") -> Path:
    """The folder, which `prepare` fills the first time. It appears only when it is whole; a second process waits.

    `number` is the recipe's number, for a folder whose name does not contain it. If the folder has a different number,
    it is prepared again.
    """
    def is_ready() -> bool:
        noted = folder / NUMBER
        return folder.is_dir() and (not number or noted.is_file() and noted.read_text() == number)

    if not is_ready():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"preparing-{folder.name.partition('-')[0]}.lock")):
            if not is_ready():
                with whole_folder(folder) as partial:
                    prepare(partial)
                    if number:
                        (partial / NUMBER).write_text(number)
    return folder

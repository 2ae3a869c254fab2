"""A set of pictures that is prepared once and then read from the cache."""

from collections.abc import Callable
from pathlib import Path

from datasets import Dataset, Features, disable_progress_bars, enable_progress_bars
from filelock import FileLock

from clipid_utils.files import whole_folder


def prepare_once(folder: Path, prepare: Callable[[Path], None]) -> Path:
    """The folder, which `prepare` fills the first time. It appears only when it is whole; a second process waits."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"preparing-{folder.name.partition('-')[0]}.lock")):
            if not folder.is_dir():
                with whole_folder(folder) as partial:
                    prepare(partial)
    return folder


def to_dataset(rows: list[dict], features: Features) -> Dataset:
    """Rows with a `png` as a Dataset of pictures with the other features."""
    columns = {name: [row[name] for row in rows] for name in features if name != "image"}
    columns["image"] = [{"bytes": row["png"], "path": None} for row in rows]
    return Dataset.from_dict({name: columns[name] for name in features}, features=features)


def save(rows, folder: Path) -> None:
    """Saves a Dataset or a DatasetDict without progress bars: it takes a second."""
    disable_progress_bars()
    rows.save_to_disk(folder)
    enable_progress_bars()

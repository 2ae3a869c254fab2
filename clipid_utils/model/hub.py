from pathlib import Path


def fetch_checkpoint(path_or_id, *, revision=None, weights=True) -> Path:
    return Path(path_or_id)

"""Where the project's files are.

`DATA` has the small files and `CHECKPOINTS` the shipped models: in a clone in the folder data/, in an installed package
in the folder `shipped` beside this file. `CACHE` has large files that can be made again: it is data/cache in a clone,
else ~/.cache/clip-indonesian. The environment variable CLIPID_DATA moves it, for example to a larger disk.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
IN_CLONE = (_PACKAGE.parent / "data" / "templates.json").is_file()
DATA = _PACKAGE.parent / "data" if IN_CLONE else _PACKAGE / "shipped"
CHECKPOINTS = DATA / "checkpoints"


def _cache() -> Path:
    if moved := os.environ.get("CLIPID_DATA"):
        return Path(moved).expanduser() / "cache"
    if IN_CLONE:
        return DATA / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "clip-indonesian"


CACHE = _cache()

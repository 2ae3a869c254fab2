"""Where the project keeps its files: `DATA` (cards, small files), `CACHE` (git-ignored) and `CHECKPOINTS`."""

import os
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
# CLIPID_DATA moves what is large and can be made again, e.g. to a disk with more room; what git keeps stays in data/.
CACHE = Path(os.environ.get("CLIPID_DATA") or DATA) / "cache"
CHECKPOINTS = DATA / "checkpoints"

if not (DATA / "templates.json").is_file():
    raise ImportError(f"{DATA / 'templates.json'} not found: clipid_utils runs from a clone, `pip install -e .` in it")

"""Makes the small wrong changes that tests/mutants/*.json lists, one at a time, and prints which ones a test notices.

    python scripts/mutants.py                # all
    python scripts/mutants.py metrics loss   # those in files whose path contains one of these words

An entry is {"file", "old", "new", "tests"}: the text `old`, which occurs once in the file, becomes `new`, and the tests
run until the first failure. The change is made in a copy of the clone under build/mutants, one copy for each worker.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = "clipid_utils", "tests", "scripts", "notebooks", "pyproject.toml", "README.md", "requirements.txt"
LONGEST = 300  # seconds; a change that makes a test hang is noticed


def copy_clone(folder: Path) -> Path:
    """A copy of the sources and tests; data/ is a link, as nothing writes there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "data").symlink_to(ROOT / "data")
    return folder


def noticed(mutant: dict, folder: Path) -> str:
    """"caught", "SURVIVED", or "outdated" if the file no longer has the text exactly once."""
    path = folder / mutant["file"]
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    if source.count(mutant["old"]) != 1:
        return "outdated"
    path.write_text(source.replace(mutant["old"], mutant["new"]), encoding="utf-8")
    environment = {  # one cache for all: a program that is compiled once is not compiled again
        **os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:nbval", "-p", "no:cacheprovider", *mutant["tests"]]
    try:
        status = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=LONGEST).returncode
    except subprocess.TimeoutExpired:
        status = 1
    finally:
        path.write_text(source, encoding="utf-8")
    return "SURVIVED" if status == 0 else "caught"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of file names; all files without them")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    mutants = [{**mutant, "list": path.stem} for path in sorted((ROOT / "tests" / "mutants").glob("*.json"))
               for mutant in json.loads(path.read_text(encoding="utf-8"))]
    if options.words:
        mutants = [mutant for mutant in mutants if any(word in mutant["file"] for word in options.words)]
    folders: queue.Queue[Path] = queue.Queue()
    for worker in range(options.workers):
        folders.put(copy_clone(ROOT / "build" / "mutants" / str(worker)))

    def tried(mutant: dict) -> str:
        folder = folders.get()
        try:
            return noticed(mutant, folder)
        finally:
            folders.put(folder)

    outcomes = []
    with ThreadPoolExecutor(options.workers) as pool:
        for mutant, outcome in zip(mutants, pool.map(tried, mutants), strict=True):
            outcomes.append(outcome)
            if outcome != "caught":
                print(f"{outcome}: {mutant['file']}: {mutant['old']!r} -> {mutant['new']!r}", flush=True)
    caught = outcomes.count("caught")
    print(f"{caught} of {len(outcomes)} changes are caught, {outcomes.count('outdated')} are outdated")
    return int(caught < 0.85 * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())

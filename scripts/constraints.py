"""Makes constraints.txt from requirements.txt: one set for every supported Python and platform; or checks it.

    python scripts/constraints.py          # write constraints.txt again; versions that still fit stay as they are
    python scripts/constraints.py --check  # resolve it for each Python and platform, installing nothing

uv resolves for all of them at once and marks packages that only some need; plain pip reads the file as well. The check
accepts wheels only, so that no platform has to compile. Both need a network.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = "3.11.0", "3.11.2", "3.12", "3.13"  # 3.11.2 is Debian 12's
PLATFORMS = "x86_64-manylinux_2_28", "aarch64-manylinux_2_28", "aarch64-apple-darwin"
MACOS = "14.0"  # the oldest for which FAISS has a wheel
FIXED = "torch==2.13.0"  # for benchmarks and references alone; its CUDA packages need no constraints
HEADER = """\
# The exact set that the course is tested with, for Python 3.11 to 3.13, Linux (x86-64, arm64) and macOS 14 (arm64).
# make, CI and Binder use it; Colab keeps its own packages (constraints-colab.txt). `make constraints` writes it again.
"""


def uv(*arguments: str | Path) -> subprocess.CompletedProcess:
    """Runs uv on requirements.txt and the extra `scale`, in the clone."""
    with tempfile.TemporaryDirectory() as folder:
        requirements, listed = Path(folder, "requirements.txt"), (ROOT / "requirements.txt").read_text(encoding="utf-8")
        requirements.write_text(listed + "ray[data]\n", encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", requirements, "--quiet", "--no-config", *arguments]
        environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": MACOS}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def write() -> int:
    path = ROOT / "constraints.txt"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "constraints.txt")
        out.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")  # uv prefers the versions that it has
        made = uv("--universal", "--python-version", PYTHONS[0], "--no-header", "--no-annotate", "--output-file", out)
        if made.returncode:
            print(made.stderr, file=sys.stderr)
            return 1
        path.write_text(f"{HEADER}{out.read_text(encoding='utf-8')}{FIXED}\n", encoding="utf-8")
    return 0


def check() -> int:
    def resolved(case: tuple[str, str]) -> tuple[str, str]:
        made = uv("--constraints", "constraints.txt", "--python-version", case[0], "--python-platform", case[1],
                  "--only-binary", ":all:", "--output-file", os.devnull)
        return f"Python {case[0]:7} {case[1]:24}", made.stderr.strip() if made.returncode else "resolves"

    with ThreadPoolExecutor(4) as pool:  # the time is the network's
        answers = list(pool.map(resolved, itertools.product(PYTHONS, PLATFORMS)))
    print("\n".join(map(" ".join, answers)))
    return int(any(answer != "resolves" for _, answer in answers))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="resolve for each Python and platform, write nothing")
    sys.exit(check() if parser.parse_args().check else write())

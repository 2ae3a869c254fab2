"""Builds the package's wheel and tries it in an empty environment, in a folder outside of any clone.

    python scripts/try_wheel.py [FOLDER]   # the wheel, the environment and a folder of pictures go to FOLDER

Only the core is installed, at the versions of constraints.txt. The shipped model is opened by its name and searches a
folder of four pictures. The command must do the same, and must name the missing extra for work that needs one.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRY = """
import sys
from pathlib import Path
from PIL import Image, ImageDraw
import clipid_utils
from clipid_utils.inference.index import build_index
from clipid_utils.inference.search import query_embeds, search

folder = Path("pictures")
folder.mkdir(exist_ok=True)
for colour in "red", "green", "blue", "yellow":
    picture = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(picture).ellipse((50, 30, 150, 130), colour)
    picture.save(folder / f"{colour}.png")
assert Path(clipid_utils.__file__).is_relative_to(sys.prefix), clipid_utils.__file__
model, processor = clipid_utils.load_clip("mini")
index = build_index(model, processor, folder, progress=False)
scores, rows = search(index, query_embeds(model, processor, text="lingkaran merah"), k=4)
print([index.keys[row] for row in rows[0]])
"""


def main() -> None:
    work = Path(sys.argv[1] if sys.argv[1:] else ROOT / "build" / "wheel").resolve()
    work.mkdir(parents=True, exist_ok=True)
    for old in work.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", work, ROOT], check=True)
    (wheel,) = work.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--clear", work / "venv"], check=True)
    python = work / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-compile", wheel,
                    "-c", ROOT / "constraints.txt"], check=True)
    count = len(subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True,
                               text=True).stdout.splitlines())
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB; {count} packages are installed with it")
    clipid = work / "venv" / "bin" / "clipid"
    subprocess.run([python, "-c", TRY], cwd=work, check=True)
    subprocess.run([clipid, "--help"], cwd=work, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([clipid, "search", "pictures", "lingkaran merah"], cwd=work, check=True)
    absent = subprocess.run([clipid, "prepare"], cwd=work, capture_output=True, text=True)
    message = absent.stderr.strip()
    if absent.returncode == 0 or "clip-indonesian[data]" not in message or len(message.splitlines()) > 1:
        raise SystemExit(f"`clipid prepare` without the extra `data` must name it in one line, and said:\n{message}")
    print(message)


if __name__ == "__main__":
    main()

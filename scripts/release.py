"""Writes the project's address and release, which pyproject.toml and clipid_utils/__init__.py have, everywhere else.

    python scripts/release.py          # after a change of either
    python scripts/release.py --check  # only lists the files that are out of date; the tests do this

README.md, CITATION.cff, the name that downloads give to servers, and the notebooks' badges and second cells are filled.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = "notebooks/**/*.ipynb", "site/locale/id/LC_MESSAGES/notebooks/*.po"


def release() -> tuple[str, str]:
    """The repository, as "owner/name" on GitHub, and the version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = (ROOT / "clipid_utils" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'__version__ = "(.+)"', source)[1]
    return project["urls"]["Repository"].removeprefix("https://github.com/"), version


def filled(name: str, text: str, repository: str, version: str) -> str:
    """The text of a file with the address and the release at each place that has them."""
    places = {
        r"(colab\.research\.google\.com/github/)[\w.-]+/[\w.-]+/blob/[^/]+/": rf"\g<1>{repository}/blob/v{version}/",
        r"(mybinder\.org/v2/gh/)[\w.-]+/[\w.-]+/[^?]+(\?)": rf"\g<1>{repository}/v{version}\g<2>",
        r"(git clone (?:-[^\n]*? )?https://github\.com/)[\w.-]+/[\w.-]+": rf"\g<1>{repository}",
        r'(RELEASE = \\?")v[\d.]+': rf"\g<1>v{version}",
        r"(\+https://github\.com/)[\w.-]+/[\w.-]+": rf"\g<1>{repository}",
    }
    if name == "CITATION.cff":
        places = {r"(?m)^(version: ).+$": rf"\g<1>{version}"}
    for pattern, place in places.items():
        text = re.sub(pattern, place, text)
    return text


def outdated() -> dict[Path, str]:
    """The files that do not have today's address and release, with the text that they should have."""
    repository, version = release()
    notebooks = (path for pattern in NOTEBOOKS for path in sorted(ROOT.glob(pattern)))
    others = "README.md", "CITATION.cff", "notebooks/tpu.md", "clipid_utils/data/download/download.py"
    paths = [*(ROOT / name for name in others), *notebooks]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return {path: new for path, text in texts.items() if (new := filled(path.name, text, repository, version)) != text}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only list the files; exit status 1 if there are any")
    check = parser.parse_args().check
    for path, text in (found := outdated()).items():
        print(path.relative_to(ROOT))
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""The package: its core is small, and its address, release and dependencies are the same wherever they are written."""

import re
import tomllib

import release

ROOT = release.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
# What only the tests and the package's build need
TOOLS = {"pytest", "pytest-xdist", "nbval", "hypothesis", "beartype", "ruff", "hatchling", "uv"}


def name(line: str) -> str:
    return re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")


def test_address_and_release_are_the_same_everywhere():
    assert [path.name for path in release.outdated()] == []


def test_another_release_reaches_every_place(monkeypatch):
    monkeypatch.setattr(release, "release", lambda: ("owner/name", "9.9.9"))
    found = {path.relative_to(ROOT).as_posix(): text for path, text in release.outdated().items()}
    assert {"README.md", "CITATION.cff", "notebooks/07_picture_search.ipynb"} <= set(found)
    assert found["notebooks/tpu.md"].count("git clone https://github.com/owner/name") == 3
    first = found["notebooks/00_start_here.ipynb"]
    assert "/owner/name/blob/v9.9.9/notebooks/id/00_" in found["notebooks/id/00_start_here.ipynb"]
    assert found["site/locale/id/LC_MESSAGES/notebooks/00_start_here.po"].count("/owner/name/blob/v9.9.9/") == 2
    for place in ("github/owner/name/blob/v9.9.9/", "gh/owner/name/v9.9.9?", 'RELEASE = \\"v9.9.9\\"',
                  "https://github.com/owner/name /content"):
        assert place in first
    assert "git clone https://github.com/owner/name &&" in found["README.md"]
    assert "(+https://github.com/owner/name{contact})" in found["clipid_utils/data/download/download.py"]


def test_core_is_small():
    assert len(PROJECT["dependencies"]) <= 14
    assert not {name(line) for line in PROJECT["dependencies"]} & {"ctranslate2", "onnx", "datasets", "matplotlib"}


def test_requirements_install_all_of_the_course():
    course = {*PROJECT["dependencies"]}
    for extra in ("heic", "data", "train", "translate", "download", "onnx", "milvus", "site", "course"):
        course |= {line for line in EXTRAS[extra] if not line.startswith("clip-indonesian")}
    required = {line for line in REQUIREMENTS if line and name(line) not in TOOLS}
    assert required == course


def test_every_extra_that_an_error_names_exists():
    named = set()
    for path in (ROOT / "clipid_utils").rglob("*.py"):
        named |= set(re.findall(r"need\([^)]*,\s*\"(\w+)\"\)", path.read_text(encoding="utf-8")))
    assert named and named <= set(EXTRAS)


def pins(file: str) -> dict[str, list[str]]:
    """The versions of each package; several where the Python or the platform decides."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package, version = re.fullmatch(r"([\w.-]+)==([\w.+!]+)( ; .+)?", line).groups()[:2]
            found.setdefault(name(package), []).append(version)
    return found


def test_constraints_have_every_direct_dependency():
    pinned = pins("constraints.txt")
    lines = [*REQUIREMENTS, *EXTRAS["scale"], *EXTRAS["bench"]]
    assert {name(line) for line in lines if line} - set(pinned) <= {"clip-indonesian"}, "make constraints"
    assert f"torch=={pinned['torch'][0]}" in EXTRAS["bench"]


def test_colab_keeps_its_own_packages_and_gets_the_others_as_tested():
    colab, pinned = pins("constraints-colab.txt"), pins("constraints.txt")
    own = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"}
    assert own < set(colab)
    assert {package: colab[package] for package in set(colab) - own} == {
        package: pinned[package] for package in set(colab) - own}

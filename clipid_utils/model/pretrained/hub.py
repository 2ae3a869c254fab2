"""A checkpoint's folder: one on this machine, or what is needed of a repository on the Hugging Face hub.

Files come through huggingface_hub into its cache, so HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold here too.
"""

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

SMALL_FILES = (  # config.json last: where the cache has it, it has the others too
    "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "sentencepiece.bpe.model", "config.json",
)
WEIGHTS = (  # in read_weights' order
    "model.safetensors", "model.safetensors.index.json", "flax_model.msgpack", "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WAITS = (1, 2, 4)  # seconds before a request is made again


def fetch_checkpoint(path_or_id: str | os.PathLike, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint: a folder as it is, else the cached snapshot of the hub's repository of that name.

    Of a repository come the configs, the tokenizer and, unless `weights` is False, the first form of the weights that
    `read_weights` takes; `revision` is a branch, tag or commit. One request finds what is new, a cut download goes on
    where it stopped, and where the hub is out of reach the snapshot in the cache is used. Raises FileNotFoundError for
    what is not there, PermissionError for what HF_TOKEN does not open, ConnectionError for a hub that is out of reach
    or breaks off, and ValueError for a folder with a revision and for an index of weights that is none.
    """
    name, folder = os.fspath(path_or_id), Path(path_or_id).expanduser()
    if name and folder.is_dir():
        if revision is not None:
            raise ValueError(f"{folder} is a folder and has no revision {revision!r}: leave the revision out")
        return folder
    if not isinstance(path_or_id, str) or _is_path_like(name):
        raise FileNotFoundError(f"{name!r} is no folder: correct the path, or give a repository on the hub as "
                                "'owner/name', from where no folder is called as its owner")
    try:
        validate_repo_id(name)
    except hub_errors.HFValidationError as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor an id on the hub, 'owner/name': correct it"
                                ) from error
    revision = revision or constants.DEFAULT_REVISION
    cached = _cached(name, revision, weights)
    files = partial(HfApi().model_info, name, revision=revision, files_metadata=True,
                    timeout=constants.HF_HUB_ETAG_TIMEOUT)
    try:
        info = _ask(files, name, revision, "the list of files", waits=() if cached else WAITS)
    except ConnectionError:
        if cached:
            return cached
        raise
    return _fetch(name, revision, info.sha, {file.rfilename: file.lfs for file in info.siblings or ()}, weights)


def _is_path_like(name: str) -> bool:
    path = Path(name)
    return (not name or name[0] in "./~" or name[-1] == "/" or "\\" in name or name.count("/") > 1
            or path.exists() or ("/" in name and path.parent.is_dir()))


def _fetch(name: str, revision: str, commit: str, there: dict[str, Any], weights: bool) -> Path:
    form = next((file for file in WEIGHTS if file in there), None)

    def fetch(file: str, why: str = "") -> Path:
        if file not in there:
            raise FileNotFoundError(f"the hub's {name!r} has no {file} at revision {revision!r}{why}: give another "
                                    "revision or repository, or a folder that save_pretrained wrote")
        return _ask(partial(_file, name, file, commit, there[file]), name, revision, file)

    if weights and form is None and "config.json" in there:
        fetch("model.safetensors", f", nor {', '.join(WEIGHTS[1:])}")
    folder = [fetch(file) for file in SMALL_FILES if file in there or file == "config.json"][-1].parent
    if weights:
        for shard in _shards(fetch(form)):
            fetch(shard, f", which its {form} names")
    _note(name, revision, commit)
    return folder


def _shards(file: Path) -> list[str]:
    """The files beside it that an index of weights names; none for weights that are one file."""
    if file.suffix != ".json":
        return []
    try:
        return sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no index of weights ({error!r}): give another revision") from error


def _file(name: str, file: str, commit: str, lfs: Any) -> Path:
    """The file in the cache, fetched if it is not there yet; `lfs` has the sha256 and size of a large one."""
    if lfs and not isinstance(try_to_load_from_cache(name, file, revision=commit), str):
        _bring(hf_hub_url(name, file, revision=commit), _storage(name) / "blobs" / lfs.sha256, lfs.size)
    return Path(hf_hub_download(name, file, revision=commit))


def _bring(url: str, blob: Path, size: int) -> None:
    """Brings a large file to where huggingface_hub keeps it, by its hash, for hf_hub_download only to link it.

    Left to itself that begins anew in every call, and does not compare the hash.
    """
    lock = blob.parents[2] / ".locks" / blob.parents[1].name / f"{blob.name}.lock"  # huggingface_hub's own
    part = blob.with_name(f"{blob.name}.incomplete")
    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # a range is of the file's own bytes
    for path in (lock, blob):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.is_file():
            return
        with open(part, "ab+") as out:
            if out.tell() > size:
                out.truncate(0)
                out.seek(0)
            http_get(url, out, resume_size=out.tell(), headers=headers, expected_size=size,
                     displayed_filename=url.rpartition("/")[2])
            out.seek(0)
            found = hashlib.file_digest(out, "sha256").hexdigest()
        if found != blob.name:
            part.unlink()
            raise ConnectionError("it came damaged and was thrown away")
        part.replace(blob)


# --- The cache --------------------------------------------------------------------------------------------------------


def _storage(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"))


def _note(name: str, revision: str, commit: str) -> None:
    """Notes, as huggingface_hub does, for which commit a revision stands when the hub is out of reach."""
    ref = _storage(name) / "refs" / revision
    if revision != commit and not (ref.is_file() and ref.read_text() == commit):
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{uuid.uuid4().hex}")  # others may be noting it
        new.write_text(commit)
        new.replace(ref)


def _cached(name: str, revision: str, weights: bool) -> Path | None:
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    form = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    whole = not weights or (form and all((folder / shard).is_file() for shard in _shards(form)))
    return folder if whole else None


# --- Patience and plain words -----------------------------------------------------------------------------------------


def _ask(call: Callable, name: str, revision: str, what: str, waits: tuple[int, ...] = WAITS) -> Any:
    """What the call returns, made again where the network or the hub's server stumbled; its error in plain words."""
    for wait in (*waits, None):
        try:
            return call()
        except (hub_errors.HTTPError, OSError, UnicodeError, json.JSONDecodeError) as error:
            if getattr(error, "errno", None) is not None:
                raise  # the disk's own
            status = getattr(getattr(error, "response", None), "status_code", 500)
            final = isinstance(error, hub_errors.OfflineModeIsEnabled | hub_errors.EntryNotFoundError)
            if wait is None or final or status < 500 or type(error) is ConnectionError:
                raise _explained(error, status, name, revision, what) from error
        time.sleep(wait)


def _explained(error: Exception, status: int, name: str, revision: str, what: str) -> OSError:
    if isinstance(error, hub_errors.LocalEntryNotFoundError):  # huggingface_hub's word for any trouble
        error = error.__cause__ or error
    said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return ConnectionError(f"{name!r} at revision {revision!r} is not whole in the cache ({_storage(name)}), and "
                               "HF_HUB_OFFLINE forbids to fetch it: unset that, or give a folder")
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return FileNotFoundError(f"the hub's {name!r} has no revision {revision!r}: give a branch, tag or commit of it")
    if status == 403 or isinstance(error, hub_errors.GatedRepoError):
        return PermissionError(f"the hub keeps {what} of {name!r} for those whom it let in ({said}): ask for access on "
                               "the repository's page, then set HF_TOKEN to a token of yours")
    if status == 401 or isinstance(error, hub_errors.RepositoryNotFoundError):
        return FileNotFoundError(f"{name!r} is no folder, and the hub shows no such repository ({said}): correct the "
                                 "name or, if it is private, set HF_TOKEN to a valid token that may read it")
    if status == 404:
        return FileNotFoundError(f"the hub has not got {what} of {name!r} at revision {revision!r} ({said}): give "
                                 "another revision")
    return ConnectionError(f"{what} of {name!r} at revision {revision!r} could not be fetched ({said}): call again "
                           "once the network and the hub are there, which goes on where this stopped; or give a folder")

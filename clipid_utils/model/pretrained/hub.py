"""Finds the folder of a checkpoint: on this machine, among the shipped ones, or on the Hugging Face hub.

Downloads go through huggingface_hub into its cache, so HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work.
"""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from clipid_utils.model.pretrained.weights import FORMS
from clipid_utils.paths import CHECKPOINTS

SMALL_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "sentencepiece.bpe.model",
)


def fetch_checkpoint(path_or_id: str | os.PathLike, *, weights: bool = True) -> Path:
    """The folder of a checkpoint.

    `path_or_id` is a folder (`~` is expanded), a training run's folder, which has the checkpoint in `model`, the name
    of a shipped checkpoint ("mini"), or the id of a repository on the Hugging Face hub. A folder wins over a shipped
    name, and both win over the hub. From the hub come the configs, the tokenizer and, unless `weights` is False, the
    first form of weights that `read_weights` takes. Without a network the cached copy is used. For an older revision,
    give the folder that `huggingface_hub.snapshot_download` returns.

    Raises FileNotFoundError if there is no such checkpoint, PermissionError for a gated repository, and ConnectionError
    if the hub cannot be reached.
    """
    name = os.fspath(path_or_id)
    if name and (folder := _local(Path(name).expanduser(), name)):
        return folder
    if not isinstance(path_or_id, str):
        raise FileNotFoundError(f"{name!r} is not a folder: correct the path")
    for form in FORMS if weights else ["config.json"]:
        shards = [form.removesuffix(".index.json").replace(".", "-*.")] if form.endswith(".index.json") else []
        folder = _snapshot(name, [*SMALL_FILES, form, *shards])
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"the hub's {name!r} has no config.json: name a different repository, or a folder "
                                    "that save_pretrained wrote")
        if (folder / form).is_file():
            return folder
    raise FileNotFoundError(f"the hub's {name!r} has no {' or '.join(FORMS)}: name a different repository")


def _local(path: Path, name: str) -> Path | None:
    shipped = [CHECKPOINTS / name] if Path(name).name == name else []
    for folder in (path, path / "model", *shipped):
        if (folder / "config.json").is_file():
            return folder
    return path if path.is_dir() else None


def _snapshot(name: str, files: list[str]) -> Path:
    """The cached snapshot of a repository with these files, downloaded if needed; errors in plain words."""
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except hub_errors.GatedRepoError as error:
        raise PermissionError(f"the hub gives {name!r} only to people who have access: ask for access on the "
                              "repository's page, then set HF_TOKEN to your token") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise FileNotFoundError(f"{name!r} is neither a folder nor a repository that the hub shows: correct the name "
                                "or, if it is private, set HF_TOKEN to a token that may read it") from error
    except (hub_errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk is full or not writable
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise ConnectionError(f"{name!r} is not a folder, could not be fetched, and is not complete in the cache "
                              f"({said}): correct the path, or call again when the hub can be reached") from error

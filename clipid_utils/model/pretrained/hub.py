"""Finds the folder of a checkpoint: on this machine, among the shipped ones, or on the Hugging Face hub.

Downloads go through huggingface_hub into its cache, so HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work.
"""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from clipid_utils.paths import CHECKPOINTS

SMALL_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "sentencepiece.bpe.model", "spiece.model", "tokenizer.model", "open_clip_config.json", "modules.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/*.json", "[0-9]_*/vocab.txt",
    "[0-9]_*/merges.txt", "[0-9]_*/*.model",
)
DENSE = ("[0-9]_Dense/model.safetensors", "[0-9]_Dense/pytorch_model.bin")  # of sentence-transformers: small
CONFIGS = ("config.json", "open_clip_config.json", "modules.json")  # one of them makes a folder a checkpoint
WEIGHTS = (  # in the order of read_weights, each with its shards
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("flax_model.msgpack",),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("open_clip_model.safetensors",),
    ("open_clip_pytorch_model.bin",),
)


def fetch_checkpoint(path_or_id: str | os.PathLike, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint.

    `path_or_id` is a folder (`~` is expanded), a training run's folder, which has the checkpoint in `model`, the name
    of a shipped checkpoint ("mini"), or the id of a repository on the Hugging Face hub. A folder has priority over a
    shipped name, and both have priority over the hub. From the hub come the configs, the tokenizer and, unless
    `weights` is False, the first form of weights that `read_weights` takes; `revision` is a branch, tag or commit.
    Without a network the cached copy is used. Raises FileNotFoundError if there is no such checkpoint, PermissionError
    for a gated repository, ConnectionError if the hub cannot be reached, and ValueError for a folder with a revision.
    """
    name = os.fspath(path_or_id)
    if name and (folder := _local(Path(name).expanduser(), name)):
        if revision is not None:
            raise ValueError(f"{folder} is a folder and has no revision {revision!r}: leave the revision out")
        return folder
    if not isinstance(path_or_id, str):
        raise FileNotFoundError(f"{name!r} is not a folder: correct the path")
    for form in WEIGHTS if weights else [()]:
        inside = [f"0_*/{file}" for file in form]  # where sentence-transformers has a folder for the transformer
        folder = snapshot(name, revision, [*SMALL_FILES, *form, *inside, *(DENSE if form else ())])
        if not _has_config(folder):
            raise FileNotFoundError(f"the hub's {name!r} has no config.json at revision {revision or 'main'!r}: name "
                                    "a different revision or repository, or a folder that save_pretrained wrote")
        if not form or (folder / form[0]).is_file() or any(folder.glob(f"0_*/{form[0]}")):
            return folder
    raise FileNotFoundError(f"the hub's {name!r} has no {' or '.join(form[0] for form in WEIGHTS)} at revision "
                            f"{revision or 'main'!r}: name a different revision or repository")


def _has_config(folder: Path) -> bool:
    return any((folder / config).is_file() for config in CONFIGS)


def _local(path: Path, name: str) -> Path | None:
    shipped = [CHECKPOINTS / name] if Path(name).name == name else []
    for folder in (path, path / "model", *shipped):
        if _has_config(folder):
            return folder
    return path if path.is_dir() else None


def snapshot(name: str, revision: str | None, files: list[str]) -> Path:
    """The cached snapshot of a repository with these files, downloaded if needed; errors in plain words."""
    where = f"{name!r} at revision {revision or 'main'!r}"
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
    except hub_errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the hub has no {where}: name a branch, tag or commit of it") from error
    except hub_errors.GatedRepoError as error:
        raise PermissionError(f"the hub gives {where} only to people who have access: ask for access on the "
                              "repository's page, then set HF_TOKEN to your token") from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.HFValidationError) as error:
        raise FileNotFoundError(f"{name!r} is not a folder, and the hub shows no such repository: correct the name "
                                "or, if it is private, set HF_TOKEN to a token that may read it") from error
    except (hub_errors.HTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk is full or not writable
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise ConnectionError(f"{name!r} is not a folder, and {where} could not be fetched and is not complete in the "
                              f"cache ({said}): correct the path, or call again when the hub can be reached") from error

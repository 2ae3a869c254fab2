"""The recorded references of `golden/record.py`, unpacked into the folders that transformers' users have."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save_file

GOLDEN = Path(__file__).resolve().parent / "golden"


@cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """By case: its inputs, pictures brought to NHWC, and what left every stage."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in recorded(name).items():
        if "/" in key:
            case, stage = key.split("/")
            found.setdefault(case, {})[stage] = value.transpose(0, 2, 3, 1) if stage == "pixel_values" else value
    return found


def config_of(name: str) -> dict:
    return json.loads(recorded(name)["config.json"].tobytes())


def weights_of(name: str) -> dict[str, np.ndarray]:
    return load(recorded(name)["model.safetensors"].tobytes())


def write_folder(folder: Path, config: dict, weights: dict[str, np.ndarray]) -> Path:
    """A checkpoint folder as transformers writes it, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return folder


def unpack(name: str, folder: Path) -> Path:
    """The reference's own two files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (folder / file).write_bytes(recorded(name)[file].tobytes())
    return folder

"""The recorded references of golden/record….py, unpacked into the folders that their users have, and comparing."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load, save_file

from clipid_utils.model.clip import HybridCLIP

GOLDEN = Path(__file__).resolve().parent / "golden"


@cache
def recorded(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """By case: its inputs, pictures brought to NHWC, and what left every stage."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in recorded(name).items():
        if "/" in key and not key.startswith("file:"):
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


def unpack(name: str, folder: Path, at: str = "") -> Path:
    """The reference's own files in a folder; those of its root, except modules.json, are in `at`."""
    for key, value in recorded(name).items():
        if key.startswith("file:") or "/" not in key:
            file = Path(key.removeprefix("file:"))
            path = folder / (file if file.name == "modules.json" or file.parent.name else at / file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(value.tobytes())
    return folder


@cache
def _jitted(call, graph):
    return jax.jit(lambda state, *inputs: call(nnx.merge(graph, state), *inputs))


def compiled(call: Callable, module: nnx.Module, *inputs):
    """`call(module, *inputs)`, compiled as one, which takes a fraction of the time of its operations one by one."""
    graph, state = nnx.split(module)
    return _jitted(call, graph)(state, *inputs)


def close(ours, expected, what: str, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=atol, err_msg=what)


def assert_outputs(model: HybridCLIP, name: str) -> None:
    """Unit vectors at 1e-5, logits at 1e-4."""
    for case, expected in cases(name).items():
        inputs = [expected.pop(key) for key in ("pixel_values", "input_ids", "attention_mask")]
        ours = compiled(HybridCLIP.__call__, model, *inputs)
        assert expected.keys() == {"image_embeds", "text_embeds", "logits_per_image"}
        for part, value in expected.items():
            close(getattr(ours, part), value, f"{case}: {part}", 1e-4 if "logits" in part else 1e-5)

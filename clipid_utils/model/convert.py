"""The way in and out of the model: `load_clip` and `save_clip`, so far in this project's own format.

A checkpoint folder holds `config.json`, `model.safetensors` (float32, one key a parameter, named by its nnx path with
dots), the tokenizer and the image processor's config.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from clipid_utils.model.clip import CLIPConfig, HybridCLIP
from clipid_utils.model.processor import CLIPProcessor

MODEL_TYPE = "clip-indonesian"


def flatten_params(state: nnx.State) -> dict[str, jax.Array]:
    """Parameters by dotted nnx path, e.g. `vision.blocks.0.attn.q_proj.kernel`."""
    return {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def save_clip(model: HybridCLIP, processor: CLIPProcessor, path: str | os.PathLike, format: str = "native") -> None:
    """Writes a checkpoint folder; the weights replace an older file only once they are whole on disk."""
    if format != "native":
        raise ValueError(f"format {format!r} is not known: this version writes 'native'")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: np.asarray(value) for key, value in flatten_params(nnx.state(model, nnx.Param)).items()}
    partial = folder / "model.safetensors.partial"
    partial.touch()
    mode = partial.stat().st_mode
    save_file(tensors, partial, metadata={"format": "flax"})
    partial.chmod(mode)  # safetensors writes for the owner alone
    partial.replace(folder / "model.safetensors")
    config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    processor.save(folder)


def load_clip(path: str | os.PathLike, *, dtype=jnp.float32) -> tuple[HybridCLIP, CLIPProcessor]:
    """The model and processor of a checkpoint folder written by `save_clip`.

    `dtype` is what the model computes in; weights stay float32. Raises FileNotFoundError for a folder that is not a
    checkpoint and ValueError for one whose keys or shapes do not fit its config, with the keys' names.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} not found: give load_clip a folder written by save_clip")
    config = _read_config(folder / "config.json")
    try:
        tensors = load_file(folder / "model.safetensors")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder / 'model.safetensors'} cannot be read ({error}): fetch or train it again") from error
    model = nnx.eval_shape(lambda: HybridCLIP(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    expected = nnx.to_flat_state(state)
    shapes = {".".join(map(str, key)): leaf.shape for key, leaf in expected}
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    wrong = [f"{key} {tensors[key].shape} instead of {shape}" for key, shape in shapes.items()
             if key in tensors and tensors[key].shape != shape]
    if missing or unknown or wrong:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: "
                         f"missing {missing}, unknown {unknown}, wrong shape {wrong}")
    filled = [(key, leaf.replace(jnp.asarray(tensors[".".join(map(str, key))]))) for key, leaf in expected]
    return nnx.merge(graph, nnx.from_flat_state(filled)), CLIPProcessor.load(folder)


def _read_config(path: Path) -> CLIPConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values.pop("model_type", None)
        if kind == MODEL_TYPE:
            return CLIPConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch or save the checkpoint again") from error
    raise ValueError(f"{path}: model_type is not {MODEL_TYPE!r}, the one format read so far, but {kind!r}")

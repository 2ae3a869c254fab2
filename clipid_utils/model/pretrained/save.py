"""Saves models: `save_clip` writes a checkpoint folder of this project, or one that transformers opens.

A folder of this project has `config.json`, `model.safetensors` (float32 or int8, one key for each parameter, which is
its nnx path with dots), the tokenizer's files and the image processor's config.
"""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from clipid_utils.files import whole_file, write_json
from clipid_utils.model.adapters import merge_adapters
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import CLIPConfig
from clipid_utils.model.pretrained.families import to_hf_config
from clipid_utils.model.pretrained.keys import TRANSFORMS, key_table
from clipid_utils.model.pretrained.parameters import flatten_params, quantized
from clipid_utils.model.pretrained.processor_files import MODEL_TYPE
from clipid_utils.model.processor import CLIPProcessor


def save_clip(
    model: HybridCLIP, processor: CLIPProcessor, path: str | os.PathLike, format: str = "native", *,
    quantize: bool = False,
) -> None:
    """Writes a checkpoint folder; each file replaces an older one only when it is complete. Adapters are merged.

    `format` is "native" or "transformers": then config.json, weights and processor files are those of the class of
    transformers that has these towers: VisionTextDualEncoderModel, CLIPModel, MetaClip2Model or SiglipModel. (The older
    name "vision-text-dual-encoder" of this format is accepted.) With `quantize`, which needs "native", matrices are
    stored in a quarter of the space, as int8 with a scale for each output of a layer or row of a table. Raises
    ValueError for a different format and for a model that no class of transformers can represent, before anything is
    written, and OSError if the disk is full.
    """
    model = merge_adapters(model)
    params = flatten_params(nnx.state(model, nnx.Param))
    if quantize and format != "native":
        raise ValueError(f"format {format!r} has no int8 weights: use quantize=True with format='native'")
    if format == "native":
        config = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
        tensors = {key: np.asarray(value, np.float32) for key, value in params.items()}
        tensors = quantized(tensors) if quantize else tensors
    elif format in ("transformers", "vision-text-dual-encoder"):
        config = to_hf_config(model.config)
        tensors = _to_torch(params, model.config, config["model_type"])
    else:
        raise ValueError(f"format {format!r} is not known: use 'native' or 'transformers'")
    folder = Path(path).expanduser()
    try:
        with whole_file(folder / "model.safetensors") as file:
            mode = os.fstat(file.fileno()).st_mode
            save_file(tensors, file.name, metadata={"format": "flax" if format == "native" else "pt"})
            os.chmod(file.name, mode)  # safetensors lets only the owner read what it writes
    except SafetensorError as error:
        raise OSError(f"{folder}: the weights were not written ({error}); an older checkpoint there is unchanged. Free "
                      "space on the disk, check that you may write the folder, and save again") from error
    write_json(folder / "config.json", config)
    processor.save(folder)


def _to_torch(params: dict[str, jax.Array], config: CLIPConfig, kind: str) -> dict[str, np.ndarray]:
    """The parameters with the names and shapes of transformers' model of a `kind`, which has no limit for logit_scale.

    A VisionTextDualEncoder's CLIP image tower has its prefix twice: transformers 4 needs it so, and transformers 5
    accepts it.
    """
    limited = params | {"logit_scale": jnp.minimum(params["logit_scale"], config.max_logit_scale)}
    parts: dict[str, list[np.ndarray]] = {}
    for key in key_table(config):
        array = TRANSFORMS[key.transform].to_torch(np.asarray(limited[key.nnx_path]), config.vision)
        parts.setdefault(key.hf_name, []).append(array)
    twice = kind == "vision-text-dual-encoder" and config.vision.ln_pre
    start = "vision_model.vision_model." if twice else "vision_model."
    arrays = {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in parts.items()}
    return {name.replace("vision_model.", start): np.asarray(array, np.float32, order="C")
            for name, array in arrays.items()}

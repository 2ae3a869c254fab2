"""Exports both towers as ONNX files, for use without Python or JAX: in a browser, on a phone, from C++, Java or Rust.

    from clipid_utils.model.pretrained.onnx import export_onnx
    export_onnx(model, "onnx", processor)   # image_encoder.onnx, text_encoder.onnx, and the processor's own files
    export_onnx(model, "onnx", processor, quantize=True)   # the same in a quarter of the space

| file | inputs | output |
|---|---|---|
| `image_encoder.onnx` | `pixel_values` [B, H, W, 3] float32 | `image_embeds` [B, E] float32, unit length |
| `text_encoder.onnx` | `input_ids`, `attention_mask` [B, L] int64 | `text_embeds` [B, E] float32, unit length |

B and L are free in each call, L up to `max_length`; a text tower without a mask (SigLIP's) takes `max_length` tokens.
Pictures are NHWC, as this library's processor, a canvas and a camera give them. Ids are int64, as runtimes' tokenizers
give them: `batch["input_ids"].astype("int64")` from ours.

The graphs are built from the config, node by node, with the `onnx` package (`onnx_towers`, `onnx_graph`): all towers
together need about forty kinds of node, all standard in opset 20 (2024), for which runtimes have fast kernels. Tracing
the program with jax2onnx (0.13.0) was tried: the image tower of the mini had 349 nodes, not 140, and was not faster;
the text tower failed: its number of tokens is free. The disadvantage is that each new part of the towers must be added
there. A parameter that no node reads is an error, and the tests compare every variant of the config with JAX.

onnxruntime makes float32 matrices of the int8 ones in each call, which takes longer than a short text itself. With a
session option it does so once, when it loads the file. Then calls are as fast as with a float32 file, and the weights
need as much memory:

    options.add_session_config_entry("session.disable_quant_qdq", "1")   # Python, onnxruntime.SessionOptions
    {extra: {session: {disable_quant_qdq: "1"}}}                         // JavaScript, onnxruntime-web
"""

import os
import tempfile
from pathlib import Path

import numpy as np

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.pretrained.onnx_graph import onnx
from clipid_utils.model.pretrained.onnx_towers import image_encoder, text_encoder
from clipid_utils.model.processor import CLIPProcessor

LARGEST_FILE = 1_500_000_000  # bytes of weights; protobuf ends at 2 GiB, and larger weights get a file of their own


def export_onnx(
    model: HybridCLIP, folder: str | os.PathLike, processor: CLIPProcessor, *, quantize: bool = False
) -> tuple[Path, Path]:
    """Writes `image_encoder.onnx` and `text_encoder.onnx` into `folder` and returns their paths, in this order.

    Everything is float32, whatever the model computes in. With `quantize` matrices are stored as int8 with a scale for
    each output of a layer or row of a table, the numbers of `save_clip(…, quantize=True)`, and are computed with in
    float32. A tower of more than 1.5 GB has its weights in `<name>.onnx.data` beside it; the two belong together. The
    processor's files (`tokenizer.json`, `preprocessor_config.json`) are written too, so the folder has all that a
    program needs. `logit_scale` in the ONNX files' metadata is a logarithm, at most `max_logit_scale`: logits are
    exp(logit_scale) * image_embeds @ text_embeds.T, plus `logit_bias` if there is one. Raises FileExistsError if
    `folder` is a file, ValueError for a different model's processor.
    """
    folder = Path(folder).expanduser()
    if processor.image_size != model.config.vision.image_size:
        raise ValueError(f"the processor makes pictures of {processor.image_size} px and the model takes "
                         f"{model.config.vision.image_size}: give export_onnx the model's own processor")
    known = {"logit_scale": str(np.log(np.float64(model.scale())))}
    if model.logit_bias is not None:
        known["logit_bias"] = str(float(model.logit_bias[...]))
    image = image_encoder(model, known, quantize=quantize)
    text = text_encoder(model, known, quantize=quantize)
    processor.save(folder)
    return _save(image, folder / "image_encoder.onnx"), _save(text, folder / "text_encoder.onnx")


def _save(model: onnx.ModelProto, path: Path) -> Path:
    """Writes the file, complete before it replaces an older one; large weights go beside it into `<name>.onnx.data`."""
    data = path.with_name(path.name + ".data")
    large = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) >= 1024]
    outside = sum(len(tensor.raw_data) for tensor in large) > LARGEST_FILE
    for tensor in large if outside else ():  # save_model's own option would look for the file in the working folder
        onnx.external_data_helper.set_external_data(tensor, data.name)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as partial:
        onnx.save_model(model, Path(partial) / path.name)
        if outside:
            (Path(partial) / data.name).replace(data)
        (Path(partial) / path.name).replace(path)
    if not outside:
        data.unlink(missing_ok=True)
    return path

"""Loading a checkpoint: its peak of memory, compared with the size of its weights, and the time.

    python benchmarks/bench_load.py [--out build/bench/load.json]

ViT-B/32 + IndoBERT-large's sizes (1.7 GB in float32) with random weights, in each form that `read_weights` knows, and
SigLIP 2 B/16 at 224 pixels (1.5 GB), each loaded in a new process; then the shipped mini checkpoint from a cold start
of Python to its first answer, imports and compilation included. Memory is the process's largest resident set, in total
and beyond the imports.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MINI = Path(__file__).resolve().parent.parent / "data" / "checkpoints" / "mini"
LOAD = """
import json, pathlib, sys, time
sys.modules["torch"] = None  # as on a user's machine: transformers would import it
import jax, jax.numpy as jnp
from transformers import BertConfig, CLIPVisionConfig
from clipid_utils import load_clip
jnp.zeros(1).block_until_ready()
def peak():  # of this program: ru_maxrss begins with that of the one which started it
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before, start = peak(), time.perf_counter()
model, _ = load_clip(sys.argv[1], param_dtype=jnp.dtype(sys.argv[2]))
jax.block_until_ready(jax.tree.leaves(model))
print(json.dumps({"peak": peak(), "before": before, "seconds": time.perf_counter() - start}))
"""
FIRST_ANSWER = """
import sys
from clipid_utils import load_clip
model, processor = load_clip(sys.argv[1])
batch = processor(text=["seekor kucing"])
assert model.encode_text(batch["input_ids"], batch["attention_mask"]).shape == (1, 128)
"""


def write_large(folder: Path, form: str) -> int:
    """Random weights of ViT-B/32 and IndoBERT-large as transformers, or its Flax, wrote them; returns their bytes."""
    import numpy as np
    from flax import nnx, serialization, traverse_util
    from safetensors.numpy import save_file

    from clipid_utils import PRESETS, HybridCLIP
    from clipid_utils.model.pretrained.families import to_hf_config
    from clipid_utils.model.pretrained.keys import TRANSFORMS, key_table

    config = PRESETS["vit_b32_indobert_large"]
    shapes = nnx.eval_shape(lambda: HybridCLIP(config, rngs=nnx.Rngs(0)))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(shapes, nnx.Param))}
    rng, arrays = np.random.default_rng(0), {}
    for key in key_table(config):
        array, name = rng.standard_normal(shapes[key.nnx_path], np.float32), key.hf_name
        if form == "flax_model.msgpack":  # Flax's names end in kernel, scale or embedding, and its kernels are as ours
            ending = key.nnx_path.rpartition(".")[2]
            ending = ending if ending in ("kernel", "scale") else "embedding"
            name = name.removesuffix("weight") + ending if name.endswith(".weight") else name
            side = config.vision.patch_size
            arrays[name] = array.reshape(side, side, 3, -1) if key.transform == "patches" else array
        else:
            arrays[name] = np.asarray(TRANSFORMS[key.transform].to_torch(array, config.vision), order="C")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    if form == "flax_model.msgpack":
        (folder / form).write_bytes(serialization.msgpack_serialize(traverse_util.unflatten_dict(arrays, sep=".")))
    elif form == "pytorch_model.bin":
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / form)
    else:
        save_file(arrays, folder / form, metadata={"format": "pt"})
    return sum(array.nbytes for array in arrays.values())


def write_siglip(folder: Path) -> int:
    """Random weights of SigLIP 2 B/16 as transformers' SiglipModel stores them; returns their bytes."""
    from bench_encode import SIGLIP2
    from flax import nnx

    from clipid_utils import CLIPProcessor, HybridCLIP, save_clip
    from clipid_utils.model.pretrained.families import clip_config

    config = clip_config(SIGLIP2, (), "siglip")
    save_clip(HybridCLIP(config, rngs=nnx.Rngs(0)), CLIPProcessor(None, 224, 64), folder, "transformers")
    return (folder / "model.safetensors").stat().st_size


def load_large(name: str, folder: str, size: int, dtype: str) -> dict:
    """Loads a checkpoint in a new process, and prints the memory and the time."""
    answer = subprocess.run([sys.executable, "-c", LOAD, folder, dtype], check=True, capture_output=True, text=True)
    found = {"bytes": size, **json.loads(answer.stdout)}
    print(f"{name}, {size / 1e9:.2f} GB, as {dtype}: peak {found['peak'] / 1e9:.2f} GB, {found['peak'] / size:.2f} "
          f"times that ({(found['peak'] - found['before']) / size:.2f} beyond the imports), {found['seconds']:.1f} s",
          flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/bench/load.json"))
    options = parser.parse_args()
    report = {}
    for form in ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack"):
        with tempfile.TemporaryDirectory() as folder:
            size = write_large(Path(folder) / "large", form)
            for dtype in ("float32", "bfloat16") if form == "model.safetensors" else ("float32",):
                report[f"{form}, {dtype}"] = load_large(f"ViT-B/32 + IndoBERT-large in {form}", f"{folder}/large",
                                                        size, dtype)
    with tempfile.TemporaryDirectory() as folder:
        size = write_siglip(Path(folder) / "siglip")
        report["siglip2_b16, float32"] = load_large("SigLIP 2 B/16", f"{folder}/siglip", size, "float32")
    times = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST_ANSWER, str(MINI)], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    report["mini, cold start to first answer"] = times
    print(f"mini, from a cold start of Python to the first answer: {min(times):.1f} to {max(times):.1f} s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

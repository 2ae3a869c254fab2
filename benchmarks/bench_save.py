"""How long a checkpoint takes: the time to save it after SIGTERM on a preempted machine, and the time to resume.

The state is that of ViT-B/32 and BERT base under AdamW with averaged weights, in float32; it is saved three times and
restored once, to the folder that `--folder` names (of a disk like the run's own). Each save includes the checksums of
its files; `fit` then also writes the weights themselves, in `last`.

    python benchmarks/bench_save.py [--folder build/bench] [--out build/bench/save.json]
"""

import argparse
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path


def measure(folder: Path) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from bench_step import our_config
    from flax import nnx

    from clipid_utils import HybridCLIP, save_clip
    from clipid_utils.model.processor import CLIPProcessor
    from clipid_utils.training.checkpoint import Checkpoints
    from clipid_utils.training.optimizers import adamw
    from clipid_utils.training.step import init_state

    config = our_config("vit_b32_bert_base")
    model = HybridCLIP(config, rngs=nnx.Rngs(0))
    _, state = init_state(model, adamw(1e-4, 0.1, 1.0), 0)
    rng = np.random.default_rng(0)  # as after training: zeros would be compressed away

    def filled(leaf):
        numbers = leaf.dtype == jnp.float32 and leaf.ndim > 0
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32)) if numbers else leaf

    state = jax.block_until_ready(jax.tree.map(filled, state))
    sides: dict = {"loop waits": [], "saved": []}
    folder.mkdir(parents=True, exist_ok=True)
    with (tempfile.TemporaryDirectory(dir=folder) as place,
          closing(Checkpoints(Path(place) / "states", keep=2)) as states):
        for step in (1, 2, 3):
            start = time.perf_counter()
            states.save(step, state)
            sides["loop waits"].append(round(time.perf_counter() - start, 2))
            states.wait()
            sides["saved"].append(round(time.perf_counter() - start, 2))
        size = sum(path.stat().st_size for path in (Path(place) / "states" / "3").rglob("*") if path.is_file())
        start = time.perf_counter()
        jax.block_until_ready(states.restore(state))
        restored = time.perf_counter() - start
        start = time.perf_counter()
        save_clip(model, CLIPProcessor(None, config.vision.image_size, 32), Path(place) / "last")
        last = time.perf_counter() - start
    return {"mib": round(size / 2**20), "seconds": sides | {"restored": round(restored, 2), "last": round(last, 2)}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--out", type=Path, default=Path("build/bench/save.json"))
    options = parser.parse_args()
    report = measure(options.folder)
    print(json.dumps(report, indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")

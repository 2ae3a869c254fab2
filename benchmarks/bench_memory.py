"""The memory of one step of fine-tuning, as XLA counts it when it compiles the step; nothing is run.

SigLIP 2 B/16 at 224 pixels, a batch of 256 pairs: all parameters in one piece, and low-rank adapters in the gradient
cache (`clipid train tune --learn lora --chunks N --remat`). It counts the step's arguments (weights, the optimizer's
state, the batch) and its temporary arrays. XLA for a CPU plans in float32; an accelerator needs about as much, or less.

    python benchmarks/bench_memory.py [--out build/bench/memory.json]
"""

import argparse
import json
from pathlib import Path

BATCH = 256
RUNS = {"all, in one piece": ("all", 1, False), "lora, in 16 chunks": ("lora", 16, False),
        "lora, in 16 chunks, remat": ("lora", 16, True), "lora, in 64 chunks, remat": ("lora", 64, True)}


def count(learn: str, chunks: int, remat: bool) -> dict[str, float]:
    """Gigabytes of the arguments and of the temporary arrays."""
    import jax
    import jax.numpy as jnp
    import optax
    from bench_encode import SIGLIP2
    from flax import nnx

    from clipid_utils import HybridCLIP
    from clipid_utils.model.adapters import add_adapters
    from clipid_utils.model.pretrained.families import clip_config
    from clipid_utils.training.loss import siglip_loss
    from clipid_utils.training.step import init_state, make_step
    from clipid_utils.training.tune import trainable

    config, graphs, optimizer = clip_config(SIGLIP2, (), "siglip"), [], optax.adamw(1e-4)

    def first_state():
        model = HybridCLIP(config, rngs=nnx.Rngs(0))
        model = add_adapters(model, 8) if learn == "lora" else model
        graph, state = init_state(model, optimizer, 0, trainable(model, learn))
        graphs.append(graph)
        return state

    state = jax.eval_shape(first_state)
    shapes = {"images": ((BATCH, 224, 224, 3), jnp.uint8), "input_ids": ((BATCH, 64), jnp.int32),
              "attention_mask": ((BATCH, 64), jnp.int32), "concepts": ((BATCH,), jnp.int32),
              "caption_ids": ((BATCH, 2), jnp.int32)}
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}
    step = make_step(graphs[0], optimizer, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, augmentation=None,
                     loss=siglip_loss, average_decay=0.0, chunks=chunks, remat=remat)
    found = step.lower(state, batch).compile().memory_analysis()
    return {"arguments": found.argument_size_in_bytes / 1e9, "temporary": found.temp_size_in_bytes / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/bench/memory.json"))
    options, report = parser.parse_args(), {}
    for name, run in RUNS.items():
        found = report[name] = count(*run)
        print(f"{name:28} {found['arguments']:6.2f} GB and {found['temporary']:6.2f} GB temporary: "
              f"{sum(found.values()):6.2f} GB", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The gradient cache: eight times the batch, in eight chunks, beside the small batch taken whole.

Each run takes the same number of examples: eight steps of the small batch, or one of the large one. It prints examples
per second and the process's peak memory. The step is `training.step.make_update`'s, on the CPU, in float32. The limits
are 1.25 times the memory and 1.45 times the time for each example.

    python benchmarks/bench_cache.py [--rounds 3] [--sizes mini vit_b32_bert_base] [--out build/bench/cache.json]
"""

import functools

import turns

SMALL, CHUNKS = {"mini": 256, "vit_b32_bert_base": 16}, 8
SIZES = {size: (CHUNKS * batch, 2) for size, batch in SMALL.items()}


def side(chunks: int, remat: bool, size: str):
    """A function that takes one large step in `chunks`, or `CHUNKS` small steps if that is 1."""
    import jax.numpy as jnp
    import numpy as np
    import optax
    from bench_step import SHAPES, our_config
    from flax import nnx

    from clipid_utils import HybridCLIP
    from clipid_utils.training.step import init_state, make_step

    config, (tokens, vocabulary) = our_config(size), SHAPES.get(size, (32, 30522))
    optimizer, batch = optax.adamw(1e-4), SMALL[size] * chunks
    graph, state = init_state(HybridCLIP(config, rngs=nnx.Rngs(0)), optimizer, 0)
    step = make_step(graph, optimizer, image_mean=(0.5,) * 3, image_std=(0.25,) * 3, augmentation=None, chunks=chunks,
                     remat=remat)
    rng, pixels = np.random.default_rng(0), config.vision.image_size
    inputs = {"images": rng.integers(0, 256, (batch, pixels, pixels, 3), np.uint8),
              "input_ids": rng.integers(0, vocabulary, (batch, tokens), np.int32),
              "attention_mask": np.ones((batch, tokens), np.int32), "concepts": np.arange(batch, dtype=np.int32),
              "may_flip": np.zeros(batch, bool)}
    inputs, states = {name: jnp.asarray(value) for name, value in inputs.items()}, [state]
    del state

    def run() -> float:
        for _ in range(CHUNKS // chunks):
            states[0], values = step(states[0], inputs)
        return float(values["loss"])

    return run


SIDES = {"chunks": functools.partial(side, CHUNKS, False), "remat": functools.partial(side, 1, True),
         "whole": functools.partial(side, 1, False)}

if __name__ == "__main__":
    report = turns.main(__file__, __doc__, SIZES, SIDES, "build/bench/cache.json")
    for size, found in (report or {}).items():
        pair = found["chunks"]
        memory, time = pair["chunks"]["peak_mib"] / pair["whole"]["peak_mib"], 1 / pair["ratio"]
        print(f"{size}: {CHUNKS} times the batch in {memory:.2f} of the memory and {time:.2f} of the time an example")

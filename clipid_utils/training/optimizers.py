"""Optimizers from optax, a learning rate for each group of parameters, and which parameters are trained."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import optax
from flax import nnx


def dotted(path: Iterable) -> str:
    """A leaf's path as the checkpoints name it: "vision.blocks.0.attn.q_proj.kernel"."""
    names = [str(getattr(part, "key", getattr(part, "name", part))) for part in path]
    return ".".join(names[:-1] if names[-1] == "value" else names)


def matching(patterns: Iterable[str]) -> Callable[[tuple, Any], bool]:
    """An nnx filter: True for parameters whose dotted path fits one of `patterns` ("vision.*", "*.projection.*")."""
    patterns = tuple(patterns)
    return lambda path, leaf: any(fnmatchcase(dotted(path), pattern) for pattern in patterns)


def check_patterns(params: nnx.State, patterns: Iterable[str]) -> None:
    """Raises ValueError for a pattern that fits no parameter; the message has names to choose from."""
    names = [dotted(path) for path, _ in nnx.to_flat_state(params)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(sorted({re.sub(r"\.\d+\..*", ".0.*", name) for name in names})[:12])
            raise ValueError(f"the pattern {pattern!r} fits no parameter; there are {some}, …")


def decayed(params: nnx.State) -> Any:
    """True for the leaves with weight decay: matrices, but not biases, norms, positions, class tokens or scales."""

    def wanted(path, leaf) -> bool:
        return leaf.ndim > 1 and "position" not in dotted(path)

    return jax.tree_util.tree_map_with_path(wanted, params)


def warmup_cosine(learning_rate: float, steps: int, warmup: int) -> optax.Schedule:
    """Linear from 0 over `warmup` steps, then half a cosine down to 0 at `steps`."""
    return optax.warmup_cosine_decay_schedule(0.0, learning_rate, max(warmup, 1), max(steps, warmup + 2))


def adamw(schedule: optax.Schedule | float, weight_decay: float, clip_norm: float, b2: float = 0.98):
    """AdamW (Loshchilov & Hutter 2019) after clipping the global gradient norm; only the leaves of `decayed` decay."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(schedule, b1=0.9, b2=b2, weight_decay=weight_decay, mask=decayed),
    )


def adabelief(schedule: optax.Schedule | float, weight_decay: float, clip_norm: float):
    """AdaBelief (Zhuang et al. 2020) after adaptive gradient clipping (Brock et al. 2021), as the ancestor trained.

    `clip_norm` is the largest ratio of a gradient's norm to the norm of its weights, unit by unit; the norm of weights
    counts as at least 0.001. The ancestor had 0.01. Decay is as in `adamw`; the ancestor had none.
    """
    return optax.chain(optax.adaptive_grad_clip(clip_norm, eps=1e-3), optax.scale_by_belief(),
                       optax.add_decayed_weights(weight_decay, mask=decayed), optax.scale_by_learning_rate(schedule))


def muon(schedule: optax.Schedule, weight_decay: float, clip_norm: float, b2: float = 0.98):
    """Muon (Jordan et al. 2024) for the matrices inside the blocks, at ten times the rate; AdamW for all others.

    An update of Muon is orthogonal: its entries are about width**-0.5 and AdamW's about 1, so ten times the rate
    changes a matrix of the mini model about as fast. The leaves of `decayed` lose `weight_decay` times that rate; the
    clip is as in `adamw`.
    """

    def label(path, leaf) -> str:
        return "muon" if leaf.ndim == 2 and ".blocks." in dotted(path) else "adam"

    parts = {
        "muon": optax.contrib.muon(lambda step: 10 * schedule(step), weight_decay=weight_decay),
        "adam": optax.adamw(schedule, b2=b2, nesterov=True, weight_decay=10 * weight_decay, mask=decayed),
    }
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.partition(parts, labels))


def rate_factors(
    params: nnx.State, rates: Mapping[str, float], layer_decay: float, layers: Mapping[str, int]
) -> Any:
    """The factor on each leaf's learning rate.

    It is the product of two: the factor of the first pattern in `rates` that fits (1 if none does), and `layer_decay`
    once for each layer between the leaf and its tower's end (Clark et al. 2020, ELECTRA). So embeddings learn slowest;
    the parameters after the last block, and the scale, have the full rate. `layers` is the number of blocks of each
    tower, frozen ones too, which are not in `params`. Raises ValueError for a pattern that fits nothing.
    """
    check_patterns(params, rates)

    def factor(path, leaf) -> float:
        name = dotted(path)
        group = next((rate for pattern, rate in rates.items() if fnmatchcase(name, pattern)), 1.0)
        block = re.match(r"(\w+)\.blocks\.(\d+)\.", name)
        if block is not None:
            return group * layer_decay ** (layers[block[1]] - int(block[2]))
        first = re.match(r"(\w+)\.(\w+_embedding|stem|ln_pre|ln)\b", name)
        return group * (1.0 if first is None else layer_decay ** (layers[first[1]] + 1))

    return jax.tree_util.tree_map_with_path(factor, params)


def with_rates(
    optimizer: optax.GradientTransformation, rates: Mapping[str, float], layer_decay: float, layers: Mapping[str, int]
) -> optax.GradientTransformation:
    """The optimizer with its updates, weight decay included, multiplied by `rate_factors`."""

    def update(updates, state, params=None):
        factors = rate_factors(updates, rates, layer_decay, layers)
        return jax.tree.map(lambda update, factor: factor * update, updates, factors), state

    return optax.chain(optimizer, optax.GradientTransformation(lambda params: optax.EmptyState(), update))

"""Teacher distillation: an Indonesian text tower learns the vectors of an English one from parallel sentences.

No pictures are needed. The teacher's text vectors are already near its picture vectors, so a student whose vector of
"seekor kucing" is the teacher's vector of "a cat" finds the same pictures (Multilingual-CLIP, Carlsson et al. 2022,
after Reimers & Gurevych 2020). Both papers minimise the squared distance between the features, before normalisation.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from clipid_utils.metrics import recall_at_k, same_key
from clipid_utils.model.clip import HybridCLIP, TextEncoder
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.loop import Loop, fitting_batch
from clipid_utils.training.optimizers import adamw, warmup_cosine
from clipid_utils.training.step import TrainState, apply_gradients, assemble, init_state


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation; names as in FitConfig."""

    epochs: int = 20
    batch_size: int = 256  # sentence pairs
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # of all steps
    clip_norm: float = 1.0
    both_languages: bool = True  # the student also learns the English sentences (Reimers & Gurevych 2020)
    evaluate_every: int = 1  # epochs
    log_every: int = 10  # steps


class Parallel(NamedTuple):
    """Sentence pairs with the teacher's features of the English sentences."""

    english: list[str]
    indonesian: list[str]
    features: Float[np.ndarray, "N E"]


class Distilled(NamedTuple):
    """`student` is the best one on the held-out pairs (without them: the last one); `history` has the log's lines."""

    student: TextEncoder
    history: list[dict]
    interrupted: bool


def distillation_loss(student: Float[Array, "B E"], teacher: Float[Array, "B E"]) -> Float[Array, ""]:
    """Mean squared error, over the sentences and the E numbers of each."""
    return jnp.mean(jnp.square(student.astype(jnp.float32) - teacher))


def parallel_features(
    teacher: TextEncoder, processor: CLIPProcessor, english: Sequence[str], indonesian: Sequence[str],
    batch_size: int = 256,
) -> Parallel:
    """Computes the teacher's features of the English sentences. Raises ValueError if the two sides do not match."""
    english, indonesian = list(english), list(indonesian)
    if len(english) != len(indonesian) or not english:
        raise ValueError(f"{len(english)} English and {len(indonesian)} Indonesian sentences: give the same number of "
                         "each, at least one")
    return Parallel(english, indonesian, text_features(teacher, processor, english, batch_size))


def text_features(
    tower: TextEncoder, processor: CLIPProcessor, texts: Sequence[str], batch_size: int = 256
) -> Float[np.ndarray, "N E"]:
    """The features of texts, in their order, before normalisation."""
    graph, params = nnx.split(tower)
    forward, rows = _forward(graph), []
    for start in range(0, len(texts), batch_size):
        part = list(texts[start : start + batch_size])
        tokens = processor.tokenize(part + part[:1] * (batch_size - len(part)), multiple=8)
        rows.append(np.asarray(forward(params, tokens["input_ids"], tokens["attention_mask"]))[: len(part)])
    return np.concatenate(rows)


@functools.lru_cache(maxsize=4)
def _forward(graph: nnx.GraphDef) -> Callable:
    return jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask).astype(jnp.float32))


def make_distill_update(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable:
    """`update(state, batch) -> (state, metrics)`.

    `batch` has `input_ids` and `attention_mask` [B, S, L] of the same B sentences in S languages, and the teacher's
    `features` [B, E]. The loss is the sum over the languages (Reimers & Gurevych 2020, equation 1; with one language
    Carlsson et al.'s).
    """

    def objective(params, frozen, batch):
        count, languages, length = batch["input_ids"].shape
        texts = (batch[name].swapaxes(0, 1).reshape(-1, length) for name in ("input_ids", "attention_mask"))
        student = nnx.merge(graph, params, frozen)(*texts)
        return languages * distillation_loss(student, jnp.tile(batch["features"], (languages, 1)))

    def update(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        value, gradients = jax.value_and_grad(objective)(state.params, state.frozen, batch)
        state, metrics = apply_gradients(state, gradients, optimizer)
        return state, {"loss": value, **metrics}

    return update


def held_out(student: TextEncoder, processor: CLIPProcessor, pairs: Parallel) -> dict[str, float]:
    """How near the student's Indonesian is to the teacher's English: mean cosine, and Recall@1 English to Indonesian.

    Pairs that have the same sentence in one language count as right for each other.
    """
    theirs, own = pairs.features, text_features(student, processor, pairs.indonesian)
    theirs, own = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (theirs, own))
    right = same_key(pairs.english, pairs.english, (pairs.indonesian, pairs.indonesian))
    return {"cosine": float((theirs * own).sum(axis=1).mean()), "R@1": recall_at_k(theirs @ own.T, right, (1,))[1]}


def distill(
    student: TextEncoder, processor: CLIPProcessor, train: Parallel, validation: Parallel | None,
    config: DistillConfig = DistillConfig(), *, seed: int, optimizer: Callable = adamw, progress: bool = True,
) -> Distilled:
    """Trains a text tower of any size on the teacher's features; `student` itself does not change.

    `processor` is the student's. Every `evaluate_every` epochs the held-out pairs are measured (`held_out`), and the
    student with the best Recall@1 is kept (ties: the later). Ctrl-C ends the run after the current step and returns the
    best student so far, or the last one if none was measured. Raises ValueError if the student's projection and the
    teacher's features differ in width, and FloatingPointError if the loss is not finite.
    """
    width, count, history = student.projection.out_features, len(train.features), []
    if width != train.features.shape[1]:
        raise ValueError(f"the student's projection gives {width} numbers and the teacher's {train.features.shape[1]}: "
                         f"make it with embed_dim {train.features.shape[1]}")
    batch_size = fitting_batch(config.batch_size, count, things="sentence pairs")
    per_epoch = count // batch_size
    steps = config.epochs * per_epoch
    rate = warmup_cosine(config.learning_rate, steps, round(config.warmup * steps))
    transform = optimizer(rate, config.weight_decay, config.clip_norm)
    graph, state = init_state(student, transform, seed)
    best: tuple[float, TextEncoder | None] = (-1.0, None)

    def evaluate(state: TrainState, line: dict) -> None:
        nonlocal best
        params = jax.tree.map(jnp.copy, state.params)  # the next step reuses the state's memory
        now = assemble(graph, state._replace(params=params), averaged=False)
        history.append(line | held_out(now, processor, validation))
        best = (history[-1]["R@1"], now) if history[-1]["R@1"] >= best[0] else best

    loop = Loop(steps, batch_size, per_epoch, rate, config.log_every, history.append, title="distilling",
                evaluate=None if validation is None else evaluate, evaluate_every=config.evaluate_every * per_epoch,
                progress=progress)
    batches = _batches(_tokens(processor, (train.indonesian, train.english)[: 1 + config.both_languages]),
                       train.features, batch_size, seed)
    state, _, interrupted = loop.run(jax.jit(make_distill_update(graph, transform), donate_argnums=0), state, batches)
    last = assemble(graph, state, averaged=False)
    return Distilled(last if best[1] is None else best[1], history, interrupted)


def _batches(tokens: dict, features: Float[np.ndarray, "N E"], batch_size: int, seed: int) -> Iterator[dict]:
    """Batches without end, in an order that depends on the seed and the epoch."""
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(features))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            yield {name: part[:, rows].swapaxes(0, 1) for name, part in tokens.items()} | {"features": features[rows]}


def _tokens(processor: CLIPProcessor, languages: Sequence[list[str]]) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask` [S, N, L] of the sentences in each of S languages."""
    tokens = processor.tokenize([text for texts in languages for text in texts], multiple=8)
    return {name: tokens[name].reshape(len(languages), len(languages[0]), -1) for name in
            ("input_ids", "attention_mask")}


def with_text_tower(model: HybridCLIP, text: TextEncoder) -> HybridCLIP:
    """A copy of the model with a different text tower, such as a student; it shares the image tower's arrays.

    Raises ValueError if the two towers give vectors of different widths.
    """
    if text.projection.out_features != model.config.embed_dim:
        raise ValueError(f"the text tower's projection gives {text.projection.out_features} numbers and the model's "
                         f"{model.config.embed_dim}")
    graph, state = nnx.split(model)
    new = nnx.merge(graph, state)
    new.config, new.text = dataclasses.replace(model.config, text=text.config), text
    return new

"""Teacher distillation: an Indonesian text tower learns from parallel sentences to land where an English one does.

No picture is needed: the teacher's text tower already lands where its image tower does, so that a student which gives
for "seekor kucing" what the teacher gives for "a cat" finds the same pictures (Multilingual-CLIP, Carlsson et al. 2022,
after Reimers & Gurevych 2020). What is compared are features, not unit vectors: both papers minimise the squared
distance between the vectors as the networks give them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from clipid_utils.metrics import recall_at_k, same_key
from clipid_utils.model.clip import HybridCLIP, TextEncoder
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.training.alarms import check_finite
from clipid_utils.training.optimizers import adamw, warmup_cosine
from clipid_utils.training.run import interruptible


@dataclass(frozen=True)
class DistillConfig:
    """Settings of a distillation, named as FitConfig's."""

    epochs: int = 20
    batch_size: int = 256  # sentence pairs
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05  # of all steps
    clip_norm: float = 1.0
    both_languages: bool = True  # the student learns the English sentences too (Reimers & Gurevych); else one language
    evaluate_every: int = 1  # epochs
    log_every: int = 10  # steps


class Parallel(NamedTuple):
    """Sentence pairs with what the teacher makes of each English one."""

    english: list[str]
    indonesian: list[str]
    features: Float[np.ndarray, "N E"]


class Distilled(NamedTuple):
    """`student` is the best measured on held-out pairs (without any: the last), `history` the lines of the log."""

    student: TextEncoder
    history: list[dict]
    interrupted: bool


def distillation_loss(student: Float[Array, "B E"], teacher: Float[Array, "B E"]) -> Float[Array, ""]:
    """Mean squared error over sentences and over the E numbers of each."""
    return jnp.mean(jnp.square(student.astype(jnp.float32) - teacher))


def parallel_features(
    teacher: TextEncoder, processor: CLIPProcessor, english: Sequence[str], indonesian: Sequence[str],
    batch_size: int = 256,
) -> Parallel:
    """Sentence pairs with the teacher's features of the English ones, computed once."""
    english, indonesian = list(english), list(indonesian)
    if len(english) != len(indonesian) or not english:
        raise ValueError(f"{len(english)} English and {len(indonesian)} Indonesian sentences: give as many of each, "
                         "at least one")
    return Parallel(english, indonesian, text_features(teacher, processor, english, batch_size))


def text_features(
    tower: TextEncoder, processor: CLIPProcessor, texts: Sequence[str], batch_size: int = 256
) -> Float[np.ndarray, "N E"]:
    """What a text tower makes of texts, in their order; not of unit length."""
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
    """`update(params, opt_state, texts, features) -> (params, opt_state, metrics)`.

    `texts` are (input_ids, attention_mask) [S, B, L] of the same B sentences in S languages; the loss is the sum of the
    languages' (Reimers & Gurevych 2020, equation 1; with one language Carlsson et al.'s).
    """

    def objective(params, texts, features):
        languages, batch, _ = texts[0].shape
        student = nnx.merge(graph, params)(*(part.reshape(languages * batch, -1) for part in texts))
        return languages * distillation_loss(student, jnp.tile(features, (languages, 1)))

    def update(params, opt_state, texts, features):
        value, gradients = jax.value_and_grad(objective)(params, texts, features)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, {"loss": value, "gradient_norm": optax.tree.norm(gradients)}

    return update


def held_out(student: TextEncoder, processor: CLIPProcessor, pairs: Parallel) -> dict[str, float]:
    """How near the student's Indonesian lies to the teacher's English: the mean cosine of a pair, and Recall@1 from
    English to Indonesian.

    Sentences that are the same in one of the languages count as right for each other.
    """
    theirs, own = pairs.features, text_features(student, processor, pairs.indonesian)
    theirs, own = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (theirs, own))
    right = same_key(pairs.english, pairs.english, (pairs.indonesian, pairs.indonesian))
    return {"cosine": float((theirs * own).sum(axis=1).mean()), "R@1": recall_at_k(theirs @ own.T, right, (1,))[1]}


def distill(
    student: TextEncoder, processor: CLIPProcessor, train: Parallel, validation: Parallel | None,
    config: DistillConfig = DistillConfig(), *, seed: int, optimizer: Callable = adamw, progress: bool = True,
) -> Distilled:
    """Trains a text tower of any size on the teacher's features; `student` itself is left as it was.

    `processor` is the student's. Every `evaluate_every` epochs the held-out pairs are measured (`held_out`), and the
    student at the best Recall@1 is kept (ties: the later). Ctrl-C ends the run after the step it is in and leaves the
    best so far, or the last where nothing was measured yet. Raises ValueError where the student's projection has
    another width than the teacher's features and for a batch larger than the data; FloatingPointError when the loss is
    not finite.
    """
    width, count = student.projection.out_features, len(train.features)
    if width != train.features.shape[1]:
        raise ValueError(f"the student's projection gives {width} numbers and the teacher's {train.features.shape[1]}: "
                         f"make it with embed_dim {train.features.shape[1]}")
    if config.batch_size > count:
        raise ValueError(f"batch_size {config.batch_size} is more than the {count} pairs: choose a smaller one")
    texts = _tokens(processor, (train.indonesian, train.english)[: 1 + config.both_languages])  # [S, N, L] each
    per_epoch = count // config.batch_size
    steps = config.epochs * per_epoch
    rate = warmup_cosine(config.learning_rate, steps, round(config.warmup * steps))
    transform = optimizer(rate, config.weight_decay, config.clip_norm)
    graph, params = nnx.split(student)
    params = jax.tree.map(jnp.array, params)  # copies: the step gives the memory of its input away
    opt_state, history, best, stop = transform.init(params), [], (-1.0, None), False
    update = jax.jit(make_distill_update(graph, transform), donate_argnums=(0, 1))
    with tqdm(total=steps, desc="distilling", unit=" steps", disable=not progress) as bar, interruptible() as asked:
        for done in range(1, steps + 1):
            epoch, place = divmod(done - 1, per_epoch)
            if not place:
                order = np.random.default_rng([seed, epoch]).permutation(count)
            rows = order[place * config.batch_size : (place + 1) * config.batch_size]
            batch = tuple(part[:, rows] for part in texts)
            params, opt_state, values = update(params, opt_state, batch, train.features[rows])
            bar.update()
            stop, end = asked(done), done == steps
            measures = validation is not None and (done % (config.evaluate_every * per_epoch) == 0 or end) and not stop
            if done % config.log_every == 0 or end or stop or measures:
                line = {"step": done, "epoch": epoch + 1} | {name: value.item() for name, value in values.items()}
                check_finite(line)
                history.append(line | {"learning_rate": float(rate(done - 1))})
            if measures:
                now = nnx.merge(graph, jax.tree.map(jnp.array, params))
                history[-1] |= held_out(now, processor, validation)
                best = (history[-1]["R@1"], now) if history[-1]["R@1"] >= best[0] else best
            if stop:
                break
    return Distilled(nnx.merge(graph, params) if best[1] is None else best[1], history, stop)


def _tokens(processor: CLIPProcessor, languages: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks [S, N, L] of the sentences in each language."""
    tokens = processor.tokenize([text for texts in languages for text in texts], multiple=8)
    both = tokens["input_ids"], tokens["attention_mask"]
    return tuple(part.reshape(len(languages), len(languages[0]), -1) for part in both)


def with_text_tower(model: HybridCLIP, text: TextEncoder) -> HybridCLIP:
    """A copy of the model with another text tower, such as a student of its own; the image tower's arrays are shared.

    ValueError where the two do not meet in as many numbers.
    """
    if text.projection.out_features != model.config.embed_dim:
        raise ValueError(f"the text tower's projection gives {text.projection.out_features} numbers and the model's "
                         f"{model.config.embed_dim}")
    graph, state = nnx.split(model)
    new = nnx.merge(graph, state)
    new.config, new.text = dataclasses.replace(model.config, text=text.config), text
    return new

"""Alarms for common failures of contrastive training, read from the lines of the log; each names a remedy.

`Alarms` reads only the lines; the compiled step adds `spread` to them.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean

import jax.numpy as jnp
from jaxtyping import Array, Float

# One batch says little about a loss, and one slow read says little about a disk. So the alarms use means of several
# lines.
LINES = 5
# Share of log(batch), which is the loss of a model that guesses. It does not depend on the positives: with equal
# logits, a target spread over several columns costs the same. The shipped run begins at 100.1% of log(batch), and is at
# 94% before the first third of its warm-up is over (step 60).
STUCK = 0.98
# Steps after the warm-up before a loss or embeddings are judged: a tenth of the run, within these bounds. A small batch
# needs that many steps to be better than a guess.
PATIENCE = (50, 200)
# 1 - cosine, averaged over the pairs of a batch. Random weights have more; texts may come near it early in the warm-up.
# Towers with less after the warm-up tell fewer inputs apart than random weights do.
COLLAPSED = 0.01
# Share of the captions since the start. The shipped run cuts 0.4%: the longest lists of keywords.
TRUNCATED = 0.01
# Share of the time between two lines.
WAITING = 0.1


def stuck(lines: Sequence[dict], after: int) -> str | None:
    losses = [line["loss"] for line in lines if line["step"] > after]
    chance = lines[-1].get("log_batch")
    if chance is None or len(losses) < LINES or fmean(losses) <= STUCK * chance:
        return None
    return (
        f"the loss is {fmean(losses):.3f}, no better than a guess, log(batch) = {chance:.3f}: check in a batch "
        "whether each caption belongs to its picture; if it does, try three times the learning_rate (now "
        f"{lines[-1]['learning_rate']:.2g}), or a third of it and a longer warmup if gradient_norm has jumped"
    )


def collapsed(lines: Sequence[dict], after: int) -> str | None:
    line = lines[-1]
    near = {what: line[f"{what}_spread"] for what in ("image", "text") if line.get(f"{what}_spread", 1.0) < COLLAPSED}
    if line["step"] <= after or not near:
        return None
    which = " and ".join(f"{what} embeddings (spread {value:.2g})" for what, value in near.items())
    return (
        f"all {which} of a batch are nearly the same vector: check whether the pictures and captions of a batch "
        "differ; if they do, start again with a third of the learning_rate, a longer warmup or a lower clip_norm"
    )


def truncated(lines: Sequence[dict]) -> str | None:
    line = lines[-1]
    if not line.get("examples") or line.get("truncated", 0) <= TRUNCATED * line["examples"]:
        return None
    return (
        f"{line['truncated'] / line['examples']:.1%} of the captions were cut ({line['truncated']} of "
        f"{line['examples']}), so their ends are never learned: raise caption_tokens, at most to the text tower's "
        "max_length, or shorten the captions"
    )


def waiting(lines: Sequence[dict]) -> str | None:
    shares = [line["data_wait_fraction"] for line in lines if "data_wait_fraction" in line]
    if len(shares) < LINES or fmean(shares) <= WAITING:
        return None
    return (
        f"{fmean(shares):.0%} of the time is spent waiting for data: raise workers (up to the number of cores), store "
        "smaller pictures, little larger than the size that training samples, or move them to a local disk"
    )


class Alarms:
    """The alarms of one run: called with each line of the log, it returns the alarms that begin there.

    An alarm is the line {"step", "alarm", "message"}; it comes once, and again only after a line without its cause.
    Lines without a loss are ignored, and a key that is absent raises no alarm. `steps` and `warmup` are those of the
    whole run. With `chance_is_log_batch=False` the loss is not judged: a guess has a different siglip_loss.
    """

    def __init__(self, steps: int, warmup: int, *, chance_is_log_batch: bool = True):
        after = warmup + min(max(PATIENCE[0], steps // 10), PATIENCE[1])
        self.checks: dict[str, Callable[[Sequence[dict]], str | None]] = {
            "collapsed": lambda lines: collapsed(lines, after), "truncated": truncated, "data_wait": waiting,
        }
        if chance_is_log_batch:
            self.checks["stuck"] = lambda lines: stuck(lines, after)
        self.lines: deque[dict] = deque(maxlen=LINES)
        self.on: set[str] = set()

    def __call__(self, line: dict) -> list[dict]:
        if "loss" not in line:
            return []
        self.lines.append(line)
        found = {name: message for name, check in self.checks.items() if (message := check(self.lines))}
        new = [{"step": line["step"], "alarm": name, "message": found[name]} for name in found if name not in self.on]
        self.on = set(found)
        return new


def check_finite(line: dict, kept: str = "nothing was saved before it") -> None:
    """Raises FloatingPointError, with what to try, if the loss or a gradient is not finite.

    `bad_step` in the line is the first step with such a gradient, counted from 0 as in the training state, or -1.
    `kept` says what was saved.
    """
    values = [line[name] for name in ("loss", "gradient_norm", "logit_scale") if name in line]
    bad_step = line.get("bad_step", -1)
    if bad_step < 0 and all(map(math.isfinite, values)):
        return
    first = f"the first gradient that is not finite was at step {bad_step + 1}; " if bad_step >= 0 else ""
    raise FloatingPointError(
        f"the loss is {line.get('loss', math.nan)} at step {line['step']}: {first}lower learning_rate or clip_norm, or "
        f"use a longer warmup; if it happens at step 1, check the first batch and the initial weights; {kept}"
    )


def spread(embeds: Float[Array, "B E"]) -> Float[Array, ""]:
    """How far apart the unit vectors of a batch are: 0 if all are the same vector, 1 if their mean is 0.

    This is 1 - |mean|², the mean over all pairs of 1 - cosine, at the cost of one sum over the batch.
    """
    return jnp.clip(1 - jnp.square(embeds.astype(jnp.float32).mean(axis=0)).sum(), 0, 1)

"""The training loop, the same for every training: steps, interruption, progress bar, log, evaluations, checkpoints."""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import multihost_utils
from tqdm.auto import tqdm

from clipid_utils.training.alarms import check_finite
from clipid_utils.training.processes import say


@dataclass
class Loop:
    """A training of `steps` steps; `run` does it."""

    steps: int
    batch_size: int  # pairs a step, of all devices together
    steps_per_epoch: int | None  # None for a stream
    learning_rate: Callable[[int], Any]  # the schedule, for the log
    log_every: int  # steps
    log: Callable[[dict], None] = print  # gets a line of metrics
    # Gets the state, and a line with step and epoch; True ends the run
    evaluate: Callable[[Any, dict], bool | None] | None = None
    evaluate_every: int = 0  # steps; the last step is always evaluated
    save: Callable[[Any, dict], None] | None = None  # gets the state, and where the loop is; None: no checkpoints
    save_every: int = 0  # steps; the last step, and the one at which a run is stopped, are always saved
    check: Callable[[dict], None] = check_finite  # raises an error for a line that is not finite
    title: str = "training"
    progress: bool = True

    def run(
        self, step: Callable[[Any, dict], tuple[Any, dict]], state: Any, batches: Iterator[dict], *, start: int = 0,
        evaluation_due: bool = False,
    ) -> tuple[Any, int, bool]:
        """Steps until the last one, Ctrl-C or SIGTERM; returns the state, its step, and whether it was stopped.

        `step(state, batch)` returns the new state and its metrics, scalars. `start` is the number of steps that are
        done already, and `evaluation_due` says that the evaluation of the last of them is missing.
        """
        if self.steps < 1:
            raise ValueError("epochs or steps is 0, so there is nothing to train: choose at least 1")
        done, stop, ended, values, clock = start, False, False, {}, Clock()
        running: deque[jax.Array] = deque(maxlen=2)
        bar = tqdm(total=self.steps, initial=start, desc="compiling", unit=" steps", disable=not self.progress)
        with bar, interruptible() as asked:
            if evaluation_due and self.evaluate is not None:
                ended = bool(self.evaluate(state, self._line(done, {})))
            while done < self.steps and not stop and not ended:
                batch = clock.next(batches, running[-1] if running else None, self.batch_size)
                if done == start and jax.process_count() == 1 and asked(done):
                    return state, done, True
                state, values = step(state, batch)
                bar.set_description(self.title, refresh=False)
                running.append(values["loss"])
                jax.block_until_ready(running[0])  # the host is at most two steps ahead of the devices
                done += 1
                bar.update()
                end = done == self.steps
                if done % self.log_every == 0 or end:
                    line = self._line(done, values)
                    bar.set_postfix(loss=f"{line['loss']:.3f}", refresh=False)
                    self.log(line | {"learning_rate": float(self.learning_rate(done - 1)), **clock.rates(),
                                     "examples": done * self.batch_size})
                    clock.restart()
                stop = asked(done)
                due = self.evaluate is not None and (end or self.evaluate_every and done % self.evaluate_every == 0)
                kept = self.save is not None and (end or stop or done % self.save_every == 0)
                if due or kept:
                    self._line(done, values)  # raises an error if a value is not finite
                with clock.pause():
                    if due and not stop:
                        ended = bool(self.evaluate(state, self._line(done, {})))
                    if kept:
                        self.save(state, {"step": done, "evaluation_due": bool(due and stop)})
        return state, done, stop

    def _line(self, done: int, values: dict) -> dict:
        line = {"step": done} | ({"epoch": -(-done // self.steps_per_epoch)} if self.steps_per_epoch else {})
        line |= {name: value.item() for name, value in values.items()}
        self.check(line)
        return line


class Clock:
    """Seconds since the last line of the log, and those in which the devices waited for data.

    Waiting counts only if the step before was over when the batch came. The time inside `pause` is left out.
    """

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.start, self.waited, self.examples = time.perf_counter(), 0.0, 0

    def next(self, source: Iterator[dict], running: jax.Array | None, batch_size: int) -> dict:
        """The next batch of `source`; `running` is a result of the step before it, None at the start."""
        before = time.perf_counter()
        try:
            batch = next(source)
        except StopIteration:
            raise ValueError("the data ended before the run: a feed must repeat its data without end") from None
        if running is None or running.is_ready():
            self.waited += time.perf_counter() - before
        self.examples += batch_size
        return batch

    @contextmanager
    def pause(self):
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def rates(self) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return {"examples_per_second": self.examples / elapsed, "data_wait_fraction": self.waited / elapsed}


@contextmanager
def interruptible():
    """Yields a function of the step that says whether to stop: after Ctrl-C, or SIGTERM, which ends a cloud machine.

    The signals do not interrupt a step, because it has already given up the memory of its old state. Several processes
    all stop after the same step. Outside the main thread no signal arrives, and only the other processes are asked.
    """

    def ask(*_) -> None:
        if several:
            signal.raise_signal(signal.SIGTERM)  # JAX listens for it, and tells the other processes
        else:
            asked.set()
            os.write(2, b"\nstopping after this step\n")  # print is not allowed to interrupt a print

    asked, several = threading.Event(), jax.process_count() > 1
    main = threading.current_thread() is threading.main_thread()
    caught = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    before = {number: signal.signal(number, ask) for number in caught} if main else {}
    try:
        yield lambda step: multihost_utils.reached_preemption_sync_point(step) if several else asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: JAX's own, which Python cannot set


PATIENCE = 5  # evaluations


def no_progress(history: list[dict], start: float) -> bool:
    """Whether the last `PATIENCE` scores in a run's log are not above the best before them, which began at `start`."""
    scores = [start, *(line["score"] for line in history if "score" in line)]
    return len(scores) > PATIENCE and max(scores[-PATIENCE:]) <= max(scores[:-PATIENCE])


def fitting_batch(batch_size: int, count: int, *, multiple: int = 1, things: str = "pictures") -> int:
    """`batch_size`, or if there are only `count` things, the largest multiple of `multiple` that they fill.

    A reduction is printed. Raises ValueError if fewer than 2 pairs would be left.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}: a contrastive loss needs at least 2 pairs, and learns from many")
    if batch_size <= count:
        return batch_size
    fitting = count - count % multiple
    if fitting < 2:
        raise ValueError(f"{count} {things} do not fill a batch of {max(multiple, 2)}: use more {things}, fewer "
                         "devices or fewer chunks")
    say(f"batch_size {batch_size} is more than the {count} {things}: it is now {fitting}")
    return fitting

"""Batches made ahead of the training step, by processes or threads, from a place that a checkpoint can hold."""

import copy
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags


class Steps(grain.IterDataset):
    """The batches `make(0)`, `make(1)`, … without end, made ahead by `workers` processes or by `threads` threads.

    The state is the number of the next batch alone, so that a run may go on with any number of either. Where there is
    `finish`, each batch goes through it in this process.
    """

    def __init__(
        self, make: Callable[[int], dict], *, workers: int = 0, threads: int = 1, finish: Callable | None = None
    ):
        super().__init__()
        self.steps, self.workers, self.threads = grain.MapDataset.range(sys.maxsize).map(make), workers, threads
        self.finish = finish or (lambda batch: batch)

    def __iter__(self) -> grain.DatasetIterator:
        return _StepsIterator(self)

    def start(self, step: int) -> grain.DatasetIterator:
        """Grain's iterator over the batches from `step` on."""
        if self.workers and not flags.FLAGS.is_parsed():  # which Grain asks for; a notebook has nothing to parse
            flags.FLAGS.mark_as_parsed()
        ahead = 0 if self.workers else self.threads
        made = self.steps[step:].to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=2 * ahead))
        options = grain.experimental.DatasetOptions(min_shm_size=2**16)  # only pictures are worth shared memory
        made = grain.experimental.WithOptionsIterDataset(made, options)
        return iter(made.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)))


class _StepsIterator(grain.DatasetIterator):
    def __init__(self, steps: Steps):
        super().__init__()
        self.steps, self.step, self.made = steps, 0, None

    def __next__(self) -> dict:
        self.start_prefetch()
        batch = self.steps.finish(next(self.made))
        if self.steps.workers:  # out of shared memory: Grain could not free what JAX on a CPU still looks at
            batch["images"] = np.array(batch["images"])
        self.step += 1
        return batch

    def start_prefetch(self) -> None:
        if self.made is None:
            self.made = self.steps.start(self.step)
            self.made.start_prefetch()

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self.step = int(state["step"])

    def close(self) -> None:
        """Ends the workers; the next batch would start others."""
        if self.made is not None:
            self.made.close()
            self.made = None


class Ahead(grain.IterDataset):
    """The elements of another dataset, two of them made ahead by a thread, with the state that follows each.

    Grain's own is a daemon, which aborts a program that ends while the thread is inside compiled code.
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _AheadIterator(self._parent.__iter__())


class _AheadIterator(grain.DatasetIterator):
    def __init__(self, source: grain.DatasetIterator):
        super().__init__(source)
        self.source, self.state = source, source.get_state()
        self.thread, self.waiting = ThreadPoolExecutor(1), deque()

    def __next__(self):
        self.start_prefetch()
        element, self.state = self.waiting.popleft().result()
        self.start_prefetch()
        return element

    def start_prefetch(self) -> None:
        while len(self.waiting) < 2:
            self.waiting.append(self.thread.submit(_next_and_state, self.source))

    def get_state(self) -> dict:
        return self.state

    def set_state(self, state: dict) -> None:
        self._forget()
        self.source.set_state(copy.deepcopy(state))
        self.state = state

    def close(self) -> None:
        self._forget()
        self.thread.shutdown()
        self.source.close()

    def _forget(self) -> None:
        while self.waiting:
            future = self.waiting.pop()
            future.cancel() or future.exception()  # waits for what has begun


def _next_and_state(source: grain.DatasetIterator) -> tuple:
    # Not a method: a thread that held the iterator last would have to close it, and so wait for itself
    return next(source), copy.deepcopy(source.get_state())

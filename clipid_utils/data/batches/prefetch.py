"""Batches made ahead of the training step, by Grain's processes or threads, from a position that a checkpoint can save.

Grain itself makes them ahead. Two things are ours: the position of `Steps` is the number of the next batch, so that a
run can resume with a different number of workers (the state of Grain's `mp_prefetch` is a state for each worker), and
the thread of `Ahead` ends before the program does.
"""

import atexit
import sys
import weakref
from collections.abc import Callable

import grain
import numpy as np
from absl import flags

from clipid_utils.data.batches.decoding import Skipped


class Steps(grain.IterDataset):
    """The batches `make(0)`, `make(1)`, … without end, made ahead by `workers` processes, or else by `threads` threads.

    The state is the number of the next batch. `troubles`, lines about skipped rows that a batch may have, become
    warnings in this process.
    """

    def __init__(self, make: Callable[[int], dict], *, workers: int = 0, threads: int = 1):
        super().__init__()
        self.make, self.workers, self.threads, self.skipped = make, workers, threads, Skipped()

    def __iter__(self) -> grain.DatasetIterator:
        return _StepsIterator(self)

    def start(self, step: int) -> grain.DatasetIterator:
        """Grain's iterator over the batches from `step` on."""
        if self.workers and not flags.FLAGS.is_parsed():  # Grain reads flags; a notebook has none to parse
            flags.FLAGS.mark_as_parsed()
        ahead = 0 if self.workers else self.threads
        steps = grain.MapDataset.range(sys.maxsize)[step:].map(self.make)
        made = steps.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=2 * ahead))
        options = grain.experimental.DatasetOptions(min_shm_size=2**16)  # only pictures are worth shared memory
        made = grain.experimental.WithOptionsIterDataset(made, options)
        return iter(made.mp_prefetch(grain.MultiprocessingOptions(self.workers, per_worker_buffer_size=2)))


class _StepsIterator(grain.DatasetIterator):
    def __init__(self, steps: Steps):
        super().__init__()
        self.steps, self.step, self.made = steps, 0, None

    def __next__(self) -> dict:
        if self.made is None:
            self.made = self.steps.start(self.step)
            self.made.start_prefetch()
        batch = next(self.made)
        self.steps.skipped.report(batch.pop("troubles", []))
        if self.steps.workers:  # out of shared memory, which Grain frees while JAX on a CPU may still read it
            batch["images"] = np.array(batch["images"])
        self.step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self.step = int(state["step"])

    def close(self) -> None:
        """Ends the workers. The next batch would start new ones."""
        if self.made is not None:
            self.made.close()
            self.made = None


_open = weakref.WeakSet()


@atexit.register
def _close_open() -> None:
    for iterator in list(_open):
        iterator.close()
        iterator.close = lambda: None  # Grain's __del__ calls it again, when modules are gone


class Ahead(grain.experimental.ThreadPrefetchIterDataset):
    """The elements of a dataset, two of them made ahead by Grain's thread.

    That thread is a daemon. A program that ended while it is inside compiled code would abort, so it is closed first.
    """

    def __init__(self, parent: grain.IterDataset):
        super().__init__(parent, prefetch_buffer_size=2)

    def __iter__(self) -> grain.DatasetIterator:
        iterator = super().__iter__()
        _open.add(iterator)
        return iterator

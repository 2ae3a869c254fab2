"""Several processes are one run: the single process's numbers, each its share of the data, one of them the writer."""

import json
import os
import re
import shutil
import signal
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import resume_worker as worker
from resume_worker import (
    BATCH,
    CONFIG,
    STEPS,
    Process,
    assert_same_run,
    free_port,
    last_notes,
    last_state,
    lines,
    steps,
)
from tiny import NAMES, tiny_pairs

from clipid_utils.data.captions import read_captions
from clipid_utils.training.fit import fit


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with worker.data_in(tmp_path_factory.mktemp("data")) as folder:
        yield folder


@pytest.fixture(scope="module")
def together(tmp_path_factory, data):
    """Runs two processes of four devices each, and gives what each noted."""
    logs = tmp_path_factory.mktemp("logs")

    def together(run, count=2, **options):
        with free_port() as port:
            started = [Process(worker.train_share, run, data, logs / f"{rank}.json", port, rank, count,
                               log=logs / f"{rank}.log", devices=8 // count, **options) for rank in range(count)]
            for process in started:
                process.ends(0)
        return [json.loads((logs / f"{rank}.json").read_text()) for rank in range(count)]

    return together


def train(run, data):
    clip, feed, config = worker.small(data)
    fit(*clip, feed, tiny_pairs(), config, seed=0, out=run, resume=True, progress=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data):
    """The folder of the same run on the eight devices of this one process."""
    run = tmp_path_factory.mktemp("alone")
    train(run, data)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, together):
    """The folder of a run of two processes that nothing has stopped, and their notes."""
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, together(run, samples=tuple(NAMES[:2]))


def assert_close_run(one, other):
    ours, theirs = last_state(one), last_state(other)
    for name, value in theirs.items():
        if "k_proj.bias" not in name:  # shifts all of a query's scores alike: its gradient is rounding alone
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    ours, theirs = ([line for line in lines(run) if "alarm" not in line] for run in (one, other))
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(whole, alone):
    run, notes = whole
    assert [note["devices"] for note in notes] == [8, 8] and jax.device_count() == 8
    assert steps(run) == [12, 16, 18]
    assert_close_run(run, alone)


@pytest.mark.slow
def test_each_process_opens_the_pictures_of_its_share_alone(whole, data):
    _, notes = whole
    _, feed, _ = worker.small(data)
    batches = iter(feed.dataset)
    records = read_captions(data / "captions.jsonl")
    number = {zlib.crc32(os.fsencode(path)): int(Path(path).stem) for path in records["image_path"]}
    order = np.array([[number[concept] for concept in next(batches)["concepts"].view(np.uint32)] for _ in range(STEPS)])
    for rank, note in enumerate(notes):
        share = order[:, rank * BATCH // 2 : (rank + 1) * BATCH // 2]
        opened = [int(name) for name in note["read"]]  # and some ahead
        assert opened[: share.size] == share.ravel().tolist()


@pytest.mark.slow
def test_only_the_first_process_writes(whole):
    run, (first, second) = whole
    assert second["written"] == []
    names = {re.sub(r"(\.\d+)?\.partial$", "", name) for name in first["written"]}
    assert {"metrics.jsonl", "fit.json", "versions.json", "best/config.json", "best/model.safetensors",
            "samples/step_000018.png"} <= names
    logged = [line["step"] for line in lines(run) if "loss" in line]
    assert logged == list(range(3, STEPS + 1, 3))  # each once
    assert first["history"] == second["history"] == len(lines(run))
    assert json.loads((run / "versions.json").read_text())["processes"] == 2
    assert last_notes(run)["data"] == [{"step": STEPS}] * 2


@pytest.mark.slow
def test_one_told_to_end_all_save_at_the_same_step_and_go_on(whole, alone, together, data, tmp_path):
    run = tmp_path / "run"
    notes = together(run, resume=True, signals={1: (5, signal.SIGTERM)})
    assert [note["interrupted"] for note in notes] == [True, True]
    stopped = steps(run)[-1]
    assert 5 <= stopped < STEPS and last_notes(run)["data"] == [{"step": stopped}] * 2
    shutil.copytree(run, tmp_path / "alone")
    notes = together(run, resume=True)
    assert [note["interrupted"] for note in notes] == [False, False]
    assert_same_run(run, whole[0])
    # One process of as many devices may go on too
    train(tmp_path / "alone", data)
    assert_close_run(tmp_path / "alone", alone)


@pytest.mark.slow
def test_a_single_process_that_was_told_of_no_others_ends_as_usual(together, tmp_path):
    """JAX has its own handler of SIGTERM then, which Python can replace but not put back."""
    (note,) = together(tmp_path / "run", count=1, signals={0: (2, signal.SIGTERM)})
    assert note["interrupted"] and steps(tmp_path / "run") == [2] and CONFIG.checkpoint_every > 2

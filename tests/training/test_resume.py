"""A run that is killed, stopped or meets a full disk and is then resumed ends like an unbroken one, bit for bit."""

import dataclasses
import functools
import itertools
import resource
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import pytest
import resume_worker as worker
from flax import nnx
from resume_worker import (
    BATCH,
    CONFIG,
    COUNT,
    LARGER,
    STEPS,
    Process,
    around,
    assert_same_run,
    at_step,
    last_state,
    lines,
    steps,
)
from tiny import tiny_clip, tiny_pairs

from clipid_utils import load_clip
from clipid_utils.data.batches.loader import dictionary_feed
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training.distributed import jit_form, make_mesh, pmap_form
from clipid_utils.training.fit import fit
from clipid_utils.training.optimizers import muon

KINDS = ["dictionary", "records", "stream"]
CLIP = tiny_clip()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    with worker.data_in(tmp_path_factory.mktemp("data")) as folder:
        yield folder


def until(true):
    """Waits for what is done behind the training."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("what was waited for has not come in five minutes")


@functools.cache
def compiled(form, devices):
    """A form whose step is compiled once for all tests; all have the same model, optimizer and settings."""
    placed = []

    def again(make_update, mesh):
        if not placed:
            placed.append(form(make_update, mesh))
        return placed[0]

    return again


def go_on(run, *events, kind="dictionary", data=None, form=jit_form, devices=1, watch=None, **options):
    """The run, or the rest of it, in this process; `events` are (step, function) pairs, called at these steps."""
    form = compiled(form, devices) if watch is None else around(watch, compiled(form, devices))
    for step, act in events:
        form = around(at_step(step, act), form)
    feed, config = worker.make_feed(kind, data, CLIP[1])
    options = {"seed": 0, "resume": True, "progress": False, "mesh": make_mesh(devices), **options}
    return fit(*CLIP, feed, tiny_pairs(), config, out=run, form=form, **options)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    """The folder of the runs that nothing has stopped, one for each kind of feed."""
    folder = tmp_path_factory.mktemp("unbroken")
    for kind in KINDS:
        go_on(folder / kind, kind=kind, data=data)
        assert steps(folder / kind) == [12, 16, 18]
        assert {line["step"] for line in lines(folder / kind)} == {3, 6, 9, 12, 15, 18}
        assert [line["alarm"] for line in lines(folder / kind) if "alarm" in line].count("truncated") == 1
    return folder


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of the run with pictures in memory."""
    return shutil.copytree(unbroken / "dictionary", tmp_path / "finished")


# --- Killed --------------------------------------------------------------------------------------------------------

# How and by which step each process of a run is killed, and the step from which the next one can at least go on; "time"
# is a moment that no step of ours decides, drawn anew in each run of the tests
KILLS = {
    "dictionary": [("step", 2, 0), ("begun", 8, 4), ("written", 16, 12), ("best", 18, 12)],
    "records": [("sealed", 12, 8)],
    "stream": [("time", 18, 0)],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again_a_run_ends_as_an_unbroken_one(unbroken, tmp_path, data, kind):
    run, start = tmp_path / "run", functools.partial(Process, worker.train, tmp_path / "run", kind, data, resume=True,
                                                     log=tmp_path / "log")
    for how, step, kept in KILLS[kind]:
        print(start(stopped=(how, step)).ends(-signal.SIGKILL))
        assert kept <= max(steps(run), default=0) < step
        if how in ("begun", "written", "sealed"):
            assert any(path.name.startswith(f"{step}.") for path in (run / "checkpoints").iterdir())
        with open(run / "metrics.jsonl", "a") as file:
            file.write('{"step": 99, "lo')  # and in the middle of a line
    go_on(run, kind=kind, data=data)
    assert_same_run(run, unbroken / kind)


# --- Stopped -------------------------------------------------------------------------------------------------------


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def weights(model):
    return {name: np.array(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


def assert_equal_weights(one, other):
    for name, value in weights(other).items():
        np.testing.assert_array_equal(weights(one)[name], value)


@pytest.mark.slow
def test_a_process_told_to_end_saves_and_goes_on_elsewhere(unbroken, tmp_path):
    process = Process(worker.train, tmp_path / "run", stopped=("wait", 5), log=tmp_path / "log")
    until(lambda: "waiting" in process.output())
    process.signal(signal.SIGTERM)
    assert "interrupted at step 5 of 18" in process.ends(0, timeout=300)
    assert steps(tmp_path / "run") == [4, 5]
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", unbroken / "dictionary")


@pytest.mark.slow
def test_stopped_at_a_check_or_at_the_last_step_nothing_is_left_out(unbroken, tmp_path):
    run = tmp_path / "run"
    for step in (2, 12, 18):
        result = go_on(run, (step, sigterm))
        assert result.interrupted and steps(run)[-1] == step
        checks = [line["step"] for line in lines(run) if "text_to_picture_R@1" in line]
        assert checks == {2: [], 12: [6], 18: [6, 12]}[step]
    result = go_on(run)
    assert not result.interrupted
    assert_same_run(run, unbroken / "dictionary")
    assert_equal_weights(result.model, load_clip(unbroken / "dictionary" / "best")[0])
    go_on(run)  # what was left out is done once
    assert lines(run) == lines(unbroken / "dictionary")


@pytest.mark.slow
def test_a_finished_run_is_read(unbroken, finished):
    result = fit(*tiny_clip(dtype=jnp.bfloat16), tiny_pairs(COUNT, LARGER), tiny_pairs(), CONFIG, seed=0, out=finished,
                 resume=True, progress=False, mesh=make_mesh(1))
    assert_same_run(finished, unbroken / "dictionary")
    assert not result.interrupted and len(result.history) == len((finished / "metrics.jsonl").read_text().splitlines())
    assert_equal_weights(result.model, load_clip(finished / "best")[0])
    assert result.model.vision.dtype == result.model.text.dtype == jnp.bfloat16  # the next stage computes as this one


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_in_another_form(unbroken, tmp_path):
    run, seen = tmp_path / "run", []

    def watch(placed):
        return placed._replace(feed=lambda batch: seen.append(batch) or placed.feed(batch))

    for form, devices, stop in ((jit_form, 8, 5), (pmap_form, 2, 11), (jit_form, 1, None)):
        events = [] if stop is None else [(stop, sigterm)]
        result = go_on(run, *events, form=form, devices=devices, watch=watch)
        assert result.interrupted is (stop is not None) and steps(run)[-1] == (stop or STEPS)
    feed = dictionary_feed(tiny_pairs(COUNT, LARGER), CLIP[1].tokenize, BATCH, seed=0, length=CONFIG.caption_tokens)
    for batch, expected in zip(seen, itertools.islice(feed.dataset, STEPS), strict=True):
        for name in ("images", "input_ids"):
            np.testing.assert_array_equal(batch[name], expected[name])
    ours, theirs = last_state(run), last_state(unbroken / "dictionary")
    for name, value in theirs.items():
        if "k_proj.bias" not in name:  # shifts all of a query's scores alike: its gradient is rounding alone
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for line, expected in zip(lines(run), lines(unbroken / "dictionary"), strict=True):
        line.pop("message", None), expected.pop("message", None)
        assert line.pop("alarm", None) == expected.pop("alarm", None)
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)


# --- Refused -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("changes, options, message", [
    ({"learning_rate": 1e-3}, {}, "began with learning_rate 0.003, now 0.001: resume with the same settings"),
    ({"batch_size": 4, "augmentation": None}, {}, "batch_size 8, now 4; augmentation .*, now None"),
    ({"checkpoint_every": 0}, {}, "began with checkpoint_every 4, now 0"),
    ({}, {"optimizer": muon}, "has the state of a different model or optimizer"),
])
def test_other_settings_are_named(finished, changes, options, message):
    before = lines(finished)
    with pytest.raises(ValueError, match=message):
        fit(*CLIP, tiny_pairs(COUNT, LARGER), tiny_pairs(), dataclasses.replace(CONFIG, **changes),
            **{"seed": 0, "out": finished, "resume": True, "progress": False, "mesh": make_mesh(1), **options})
    assert lines(finished) == before and steps(finished) == [12, 16, 18]


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 0])
def test_a_folder_that_holds_a_run_is_not_begun_again(finished, every):
    config, before = dataclasses.replace(CONFIG, checkpoint_every=every), lines(finished)
    with pytest.raises(FileExistsError, match="finished has a run at step 18: continue it .*or use a different folder"):
        fit(*CLIP, tiny_pairs(COUNT, LARGER), tiny_pairs(), config, seed=0, out=finished, mesh=make_mesh(1),
            progress=False)
    assert lines(finished) == before


# --- A disk that takes no more -------------------------------------------------------------------------------------


@pytest.fixture
def disk():
    """How large a file may grow: a write beyond it fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_a_disk_full_at_a_checkpoint_costs_only_that_one(unbroken, tmp_path, disk, caplog):
    run = tmp_path / "run"

    def fill():
        until(lambda: steps(run) == [4])
        disk(30_000)

    def make_room():
        until(lambda: "File too large" in caplog.text)
        disk(None)

    with pytest.raises(OSError, match="the checkpoint of step 8 was not written .*File too large.*; .* is of step 4"):
        go_on(run, (7, fill), (11, make_room))  # told at the next one
    assert steps(run) == [4]
    go_on(run)
    assert_same_run(run, unbroken / "dictionary")


@pytest.mark.slow
def test_a_disk_full_at_a_check_leaves_the_best_weights(unbroken, tmp_path, disk):
    run, checked = tmp_path / "run", []

    def fill():
        until(lambda: steps(run)[-1:] == [8])
        checked.append((run / "best" / "model.safetensors").read_bytes())
        disk(30_000)

    with pytest.raises(OSError, match="best: the weights were not written .*File too large"):
        go_on(run, (12, fill))
    disk(None)
    assert sorted(path.name for path in (run / "best").glob("model*")) == ["model.safetensors"]
    assert (run / "best" / "model.safetensors").read_bytes() == checked[0]
    go_on(run)
    assert_same_run(run, unbroken / "dictionary")

"""`clipid train RECIPE`, stopped in either of two stages and called with --resume, or on two hosts, is one run."""

import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from resume_worker import Process, around, at_step, cached_in, connect, die, free_port, lines, steps
from safetensors.numpy import load_file
from test_command import write_place

from clipid_utils import __main__
from clipid_utils.training import command

# For each recipe: the stages through the towers, other options that make it small, and the stage and step in which its
# processes end, and how. Checkpoints are at steps 2 and 4; a stage on features keeps none.
RECIPES = {
    "ancestor-indobert-large": ([0, 1], [], [("stage-1", 3, "killed"), ("stage-2", 3, "killed")]),
    "indobert-base": (
        [1], ["--stages.0.fit.epochs", "2", "--stages.0.fit.batch-size", "8", "--stages.0.fit.log-every",
              "1", "--stages.1.fit.chunks", "2", "--stages.1.fit.rates", "text.*", "2.0"],
        [("stage-1", 3, "killed"), ("stage-2", 1, "told")],
    ),
}


def train(commands: list[list[str]], cache: Path, stage: str = "", step: int = 0, how: str = "") -> None:
    """`clipid train …`, one after the other, and what stops it at this step of this stage."""

    def act():
        return die() if how == "killed" else signal.raise_signal(signal.SIGTERM)

    fit, train_projections = command.fit, command.train_projections

    def stopped_fit(*args, out, form, **options):
        form = around(at_step(step, act), form) if out.name == stage else form
        return fit(*args, out=out, form=form, **options)

    def stopped_projections(*args, on_log, **options):
        def log(history):
            on_log(history)
            if stage == "stage-1" and history[-1]["step"] == step:
                act()

        return train_projections(*args, on_log=log, **options)

    command.fit, command.train_projections = stopped_fit, stopped_projections
    with cached_in(cache):
        for arguments in commands:
            __main__.main(["train", *arguments])


def on_host(command_line: list[str], cache: Path, port: int, rank: int) -> None:
    """`train` as one of two workers, which find each other here by a port in place of the machines' own word."""
    initialize = jax.distributed.initialize
    jax.distributed.initialize = lambda: (initialize(f"localhost:{port}", 2, rank), connect())
    train([command_line], cache)


def arguments(name: str, place: Path) -> list[str]:
    """The recipe's command line for the small towers and few steps."""
    fits, options, _ = RECIPES[name]
    options = [name, "--train", str(place / "captions.jsonl"), "--vision", str(place / "vision"), "--text",
               str(place / "bert"), *options]
    for number in fits:
        for option, value in (("steps", 4), ("batch-size", 8), ("caption-tokens", 8), ("evaluate-every", 9),
                              ("log-every", 1), ("checkpoint-every", 2)):
            options += [f"--stages.{number}.fit.{option}", str(value)]
    return options


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_stopped_in_either_stage_a_run_ends_with_the_weights_of_an_unbroken_one(name, place, tmp_path):
    fits, _, stops = RECIPES[name]
    run, unbroken, options = tmp_path / "run", tmp_path / "unbroken", arguments(name, place)
    go_on = [*options, "--out", str(run), "--resume"]
    for stage, step, how in stops:
        process = Process(train, [go_on], tmp_path / "cache", stage, step, how, log=tmp_path / f"{stage}.log")
        output = process.ends(-signal.SIGKILL if how == "killed" else 130)
        assert not (run / "model").exists() and (run / "stage-2").exists() == (stage == "stage-2")
        if how == "told":
            assert "stopped: run the same command with --resume to continue" in output
            assert steps(run / stage) == [step]
    before = (run / "stage-1" / "metrics.jsonl").stat().st_mtime_ns
    whole = [*options, "--out", str(unbroken)]
    Process(train, [go_on, whole], tmp_path / "cache", log=tmp_path / "end.log").ends(0)
    if 0 not in fits:  # what came of the features was read, not trained again
        assert (run / "stage-1" / "metrics.jsonl").stat().st_mtime_ns == before
    for stage in ("stage-1", "stage-2"):
        assert lines(run / stage) == lines(unbroken / stage) and lines(run / stage)[-1]["step"] == 4
    model = (run / "model" / "model.safetensors").read_bytes()
    assert model == (unbroken / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_two_hosts_train_what_one_does(place, tmp_path):
    """Features by the first, a step over the devices of both, and one folder that both write and neither twice."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    options = [*arguments("indobert-base", place), "--dtype", "float32", "--stages.1.fit.chunks", "1"]
    with free_port() as port:
        hosts = [Process(on_host, [*options, "--out", str(run), "--hosts"], tmp_path / f"cache-{rank}", port, rank,
                         log=tmp_path / f"{rank}.log", devices=4) for rank in range(2)]
        for host in hosts:
            host.ends(0)
    Process(train, [[*options, "--out", str(alone)]], tmp_path / "cache", log=tmp_path / "alone.log", devices=8).ends(0)
    for stage in ("stage-1", "stage-2"):
        logged = ([line for line in lines(folder / stage) if "alarm" not in line] for folder in (run, alone))
        for line, expected in zip(*logged, strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, alone))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-4, err_msg=name)

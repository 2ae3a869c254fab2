"""The run's folder: its files, the part that a resumed run keeps, and the other places of the lines."""

import json
import struct
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny import tiny_pairs

from clipid_utils import versions
from clipid_utils.training import log as runlog
from clipid_utils.training.log import RunLog, read_lines
from clipid_utils.training.validation import retrieval_grid

CONFIG = {"epochs": 2, "learning_rate": 1e-3}
PICTURE = Figure((0.1, 0.08), dpi=100)


def line(step, **more):
    return {"step": step, "loss": 1 / step, **more}


def written(folder, steps=(10, 20, 30), **options):
    """A run's folder with these lines and, at each, a sample."""
    log = RunLog(folder, CONFIG, **options)
    for step in steps:
        log.log(line(step))
        log.picture(PICTURE, step)
    log.close()
    return log


def samples(folder):
    return sorted(path.name for path in (folder / "samples").iterdir())


def events(folder):
    """The events in the folder's TensorBoard files, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def curve(folder, name):
    return [(event.step, round(value.simple_value, 4)) for event in events(folder) for value in event.summary.value
            if value.tag == name]


# --- The folder ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_config_versions_lines_and_samples(tmp_path):
    folder = tmp_path / "new" / "run"
    log = written(folder)
    assert json.loads((folder / "fit.json").read_text()) == CONFIG
    assert read_lines(folder / "metrics.jsonl") == log.history == [line(10), line(20), line(30)]
    assert samples(folder) == ["step_000010.png", "step_000020.png", "step_000030.png"]
    assert Image.open(folder / "samples" / "step_000010.png").size == (10, 8)
    assert sorted(path.name for path in folder.iterdir()) == ["fit.json", "metrics.jsonl", "samples", "versions.json"]


def test_versions_say_what_the_run_ran_on(tmp_path):
    written(tmp_path)
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["jax"] == jax.__version__
    assert found["numpy"] == np.__version__ and found["command"] == sys.argv
    assert (found["platform"], found["devices"], found["processes"]) == ("cpu", jax.device_count(), 1)
    assert {"flax", "optax", "orbax-checkpoint", "grain", "clipid_utils", "commit", "device_kind"} <= found.keys()


def test_the_commit_is_the_clones_and_none_without_git(monkeypatch, tmp_path):
    file = tmp_path / "versions.py"
    file.write_text("of a clone")
    monkeypatch.setattr(versions, "__file__", str(file))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "versions.py"], ["commit", "-qm", "first", "--no-gpg-sign"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert len(head) == 40 and versions.commit() == head
    file.write_text("changed")
    assert versions.commit() == f"{head}-dirty"
    answer = types.SimpleNamespace(stdout="")
    monkeypatch.setattr(versions.subprocess, "run", lambda *args, **kwargs: answer)
    assert versions.commit() is None

    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(versions.subprocess, "run", missing)
    assert versions.commit() is None


def test_every_line_is_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    for step in (1, 2):
        log.log(line(step))
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step


def test_no_folder_is_a_history_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = written(None)
    assert len(log.history) == 3 and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="need a folder for the run"):
        RunLog(None, CONFIG, tensorboard=True)


def test_a_new_run_in_an_old_folder_leaves_the_checkpoints(tmp_path):
    written(tmp_path)
    for name in ("best", "checkpoints/20"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_text("kept")
    written(tmp_path, steps=[5])
    assert read_lines(tmp_path / "metrics.jsonl") == [line(5)]
    assert all((tmp_path / name / "weights").read_text() == "kept" for name in ("best", "checkpoints/20"))


def test_only_the_first_process_writes_and_each_one_has_the_history(tmp_path, monkeypatch):
    written(tmp_path / "run")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = written(tmp_path / "run", steps=[30], resume_step=20, tensorboard=True)
    assert log.history == [line(10), line(20), line(30)]
    monkeypatch.undo()
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [line(10), line(20), line(30)]
    written(tmp_path / "other")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    written(tmp_path / "none")
    assert not (tmp_path / "none").exists()


# --- Resumed -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_after_its_step(tmp_path):
    written(tmp_path)
    log = written(tmp_path, steps=[25], resume_step=20)
    assert log.history == read_lines(tmp_path / "metrics.jsonl") == [line(10), line(20), line(25)]


def test_a_line_half_written_when_the_run_died_is_dropped(tmp_path):
    written(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 40, "lo')
    log = written(tmp_path, steps=[40], resume_step=35)
    assert log.history == read_lines(tmp_path / "metrics.jsonl") == [line(10), line(20), line(30), line(40)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    written(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 20', '"step": 20'))
    before = path.read_text()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not valid JSON .*or delete the line"):
        RunLog(tmp_path, CONFIG, resume_step=30)
    assert path.read_text() == before


def test_a_folder_that_lost_its_lines_is_resumed_without_them(tmp_path):
    written(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert written(tmp_path, steps=[30], resume_step=20).history == [line(30)]


def test_what_the_first_steps_ran_on_is_kept(tmp_path, monkeypatch):
    for number, resume in (("1", None), ("2", 20), ("3", 40)):
        monkeypatch.setattr(runlog, "environment", lambda number=number: {"jax": number})
        written(tmp_path, resume_step=resume)
    assert json.loads((tmp_path / "versions.json").read_text()) == {
        "jax": "3", "before": [{"until_step": 20, "jax": "1"}, {"until_step": 40, "jax": "2"}]
    }  # fmt: skip
    written(tmp_path)
    assert json.loads((tmp_path / "versions.json").read_text()) == {"jax": "3"}


# --- TensorBoard, Weights & Biases ---------------------------------------------------------------------------------


def test_tensorboard_gets_curves_and_pictures(tmp_path):
    log = RunLog(tmp_path, CONFIG, tensorboard=True)
    log.log(line(10, logit_scale=2.5))
    log.log({"step": 10, "alarm": "stuck", "message": "try this"})  # in metrics.jsonl alone
    log.picture(PICTURE, 10)
    log.close()
    assert curve(tmp_path, "loss") == [(10, 0.1)] and curve(tmp_path, "logit_scale") == [(10, 2.5)]
    values = [value for event in events(tmp_path) for value in event.summary.value]
    assert {value.tag for value in values} == {"loss", "logit_scale", "retrieval"}
    (image,) = [value.image for value in values if value.tag == "retrieval"]
    assert (image.height, image.width) == (8, 10)


def test_tensorboard_hides_what_is_run_again(tmp_path):
    """A session that starts at a step hides everything from that step on in the files before it."""
    written(tmp_path, tensorboard=True)
    written(tmp_path, steps=[25], resume_step=20, tensorboard=True)
    assert [event.step for event in events(tmp_path) if event.session_log.status == 1] == [0, 21]
    assert sorted(curve(tmp_path, "loss")) == [(10, 0.1), (20, 0.05), (25, 0.04), (30, 0.0333)]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package that keeps what it is told."""
    fake = types.ModuleType("wandb")
    fake.inits, fake.logged, fake.finished = [], [], []
    run = types.SimpleNamespace(
        log=fake.logged.append, finish=lambda: fake.finished.append(True),
        define_metric=lambda name, step_metric: fake.inits[-1].update(metric=(name, step_metric)),
    )  # fmt: skip
    fake.init = lambda **options: fake.inits.append(options) or run
    fake.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_lines_and_pictures_where_asked(tmp_path, wandb):
    written(tmp_path, steps=[10], wandb="clip-indonesian")
    assert wandb.inits[0]["project"] == "clip-indonesian" and wandb.inits[0]["config"] == CONFIG
    assert wandb.inits[0]["metric"] == ("*", "step")
    picture = ("image", str(tmp_path / "samples" / "step_000010.png"))
    assert wandb.logged == [line(10), {"step": 10, "retrieval": picture}] and wandb.finished == [True]
    written(tmp_path)
    assert len(wandb.inits) == 1


def test_wandb_goes_on_in_the_same_run_when_resumed_and_only_then(tmp_path, wandb):
    for options in ({}, {"resume_step": 20}, {}):
        written(tmp_path, wandb="clip-indonesian", **options)
    first, resumed, new = wandb.inits
    assert first["id"] == resumed["id"] != new["id"] and resumed["resume"] == "allow"


@pytest.mark.parametrize("module, options, message", [
    ("wandb", {"wandb": "clip-indonesian"}, "pip install wandb"),
    ("tensorboardX", {"tensorboard": True}, "needs tensorboardX, from an extra"),
])
def test_what_is_not_installed_is_named_with_the_remedy(tmp_path, monkeypatch, module, options, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        RunLog(tmp_path, CONFIG, **options)
    RunLog(tmp_path, CONFIG)


def test_starting_up_waits_for_no_plotting_and_no_other_place():
    code = ("import sys, clipid_utils.training.log; "
            "print({'matplotlib', 'tensorboardX', 'wandb'} & sys.modules.keys())")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# --- Samples -------------------------------------------------------------------------------------------------------


def test_a_sample_shows_the_best_pictures_of_each_query_and_frames_the_right_ones(tmp_path):
    pairs = tiny_pairs(14)  # 12 and 13 are second pictures of the names of 0 and 1
    similarity = np.zeros((2, 14), np.float32)
    similarity[0, [12, 5, 0]] = 0.9, 0.8, 0.7
    similarity[1, [3, 1, 2]] = 0.6, 0.5, 0.4
    figure = retrieval_grid(similarity, pairs, [pairs.names[0].title(), pairs.names[1]], k=3)
    assert isinstance(figure, Figure) and len(figure.axes) == 6
    for axis, row in zip(figure.axes, (12, 5, 0, 3, 1, 2), strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), pairs.images[row])
    titles = [axis.get_title() for axis in figure.axes]
    assert [title[0] for title in titles] == list("✓✗✓✗✓✗") and "0.90" in titles[0] and pairs.names[5] in titles[1]
    assert [axis.get_ylabel() for axis in figure.axes] == [pairs.names[0].title(), "", "", pairs.names[1], "", ""]
    log = RunLog(tmp_path, CONFIG)
    log.picture(figure, 7)
    with Image.open(tmp_path / "samples" / "step_000007.png") as picture:
        assert picture.size == (510, 430)


def test_a_sample_of_few_pictures_is_smaller():
    pairs = tiny_pairs(2)
    assert len(retrieval_grid(np.eye(2, dtype=np.float32), pairs, pairs.names, k=5).axes) == 4

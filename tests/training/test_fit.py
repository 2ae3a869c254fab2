"""The loop: what it logs, what it keeps, and that nothing is lost when it is stopped or the loss is no number."""

import dataclasses
import itertools
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import short_clip, tiny_pairs, tiny_processor

from clipid_utils import load_clip
from clipid_utils.data.batches.loader import Feed, dictionary_feed
from clipid_utils.data.batches.prefetch import Steps
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training import loop, run_folder
from clipid_utils.training.distributed import jit_form, make_mesh
from clipid_utils.training.fit import FitConfig, fit
from clipid_utils.training.loss import siglip_loss
from clipid_utils.training.run_folder import RunFolder
from clipid_utils.training.validation import validation_recall

QUICK = {"epochs": 4, "batch_size": 4, "learning_rate": 1e-2, "caption_tokens": 16, "evaluate_every": 2, "log_every": 3,
         "augmentation": None}


COMPILED = {}  # steps by all that decides their program; most tests share one


def run(clip, config=None, pairs=None, validation=True, wrap=lambda step: step, **options):
    """`fit` on one device; `wrap` gets the compiled step and returns a different one."""
    pairs, config = pairs or tiny_pairs(12), FitConfig(**{**QUICK, **(config or {})})
    options = {"seed": 0, "progress": False, "mesh": make_mesh(1), **options}
    unused = {"log_every": 1, "evaluate_every": 1, "checkpoint_every": 0, "caption_tokens": 0, "group_concepts": False}
    settings = repr(dataclasses.replace(config, **unused))

    def form(make_update, mesh):
        key = make_update.args[0], settings, len(pairs), options.get("loss"), mesh.size
        if key not in COMPILED:
            COMPILED[key] = jit_form(make_update, mesh)
        return COMPILED[key]._replace(step=wrap(COMPILED[key].step))

    return fit(*clip, pairs, pairs if validation else None, config, form=form, **options)


def weights(model):
    return {name: np.array(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


def assert_equal_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name])


def read_lines(folder):
    """The lines of metrics.jsonl without alarms; these tiny runs raise some."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "alarm" not in line]


def test_a_whole_run(tmp_path):
    clip = short_clip()
    before, logged = weights(clip[0]), []
    result = run(clip, out=tmp_path / "run", on_log=lambda history: logged.append(len(history)))
    assert not result.interrupted
    lines = read_lines(tmp_path / "run")
    assert lines == json.loads(json.dumps([line for line in result.history if "alarm" not in line]))
    training = [line for line in lines if "loss" in line]
    checks = [line for line in lines if "text_to_picture_R@1" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 12] and [line["step"] for line in checks] == [6, 12]
    assert len(logged) == 4
    for line in training:
        assert line["log_batch"] == pytest.approx(math.log(4)) and line["examples"] == 4 * line["step"]
        assert {"logit_scale", "gradient_norm", "learning_rate", "examples_per_second"} <= line.keys()
        assert 0 <= line["data_wait_fraction"] <= 1
    for line in checks:
        assert {f"{way}_R@{k}" for way in ("text_to_picture", "picture_to_text") for k in (1, 5, 10)} < line.keys()
    assert json.loads((tmp_path / "run" / "fit.json").read_text())["learning_rate"] == 1e-2
    # The best is on disk and returned; the model that was given is as it was
    assert_equal_weights(load_clip(tmp_path / "run" / "best")[0], result.model)
    for name, value in weights(clip[0]).items():
        np.testing.assert_array_equal(value, before[name])
    assert any((value != before[name]).any() for name, value in weights(result.model).items())


def test_training_learns_the_pictures(tmp_path):
    clip, pairs = short_clip(), tiny_pairs(12)
    result = run(clip, {"epochs": 200, "evaluate_every": 100, "batch_size": 12, "learning_rate": 3e-3}, out=tmp_path)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[-1] < losses[0] / 2
    assert validation_recall(result.model, clip[1], pairs)["text_to_picture_R@1"] > 0.6


def test_the_same_seed_is_the_same_run():
    one, other, third = (run(short_clip(), seed=seed) for seed in (0, 0, 1))
    assert_equal_weights(one.model, other.model)
    assert any((value != weights(third.model)[name]).any() for name, value in weights(one.model).items())


def test_no_folder_and_no_validation_is_a_run_too(tmp_path, capsys):
    result = run(short_clip(), validation=False)
    assert capsys.readouterr().out.splitlines() == [
        "no validation pictures (--validation): recall is not measured, and the last weights are kept"]
    assert np.isfinite([line["loss"] for line in result.history if "loss" in line]).all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bias, options", [(None, {"loss": siglip_loss}), (-5.0, {})])
def test_a_loss_needs_its_own_kind_of_model(bias, options):
    with pytest.raises(ValueError, match="siglip_loss needs a model with CLIPConfig.logit_bias=-10.0"):
        run(short_clip(logit_bias=bias), **options)


def test_siglip_in_place_of_clip():
    result = run(short_clip(logit_bias=-5.0, logit_scale=1.0), loss=siglip_loss)
    assert weights(result.model)["logit_bias"] != -5.0


def test_pictures_of_one_concept_may_attract_each_other_too():
    """The loss that is logged stays that of pictures and texts, whatever else is learned from."""
    options = {"group_concepts": True, "epochs": 1, "log_every": 1, "batch_size": 12}
    plain, both = (run(short_clip(), {**options, "image_image": weight}, pairs=tiny_pairs(24)) for weight in (0.0, 1.0))
    assert plain.history[0]["loss"] == both.history[0]["loss"]
    assert plain.history[0]["gradient_norm"] != both.history[0]["gradient_norm"]


def test_the_best_check_is_kept_not_the_last(tmp_path, monkeypatch):
    recalls = iter([0.2, 0.7, 0.5])
    kept = []

    def scripted(model, processor, pairs, embeds):
        kept.append(weights(model))
        return {"text_to_picture_R@1": next(recalls)}

    monkeypatch.setattr(run_folder, "validation_recall", scripted)
    result = run(short_clip(), {"epochs": 6}, out=tmp_path)
    for model in (result.model, load_clip(tmp_path / "best")[0]):
        for name, value in weights(model).items():
            np.testing.assert_array_equal(value, kept[1][name])


def test_recall_counts_pictures_of_one_name_as_right():
    clip, pairs = short_clip(), tiny_pairs(12)
    pairs = pairs.take([0] * 10 + [1])
    recall = validation_recall(*clip, pairs)
    assert recall["text_to_picture_R@10"] == 1.0 and set(recall) == {
        f"{way}_R@{k}" for way in ("text_to_picture", "picture_to_text") for k in (1, 5, 10)
    }


def test_speed_is_that_of_training_alone(monkeypatch):
    """On a clock where a step takes one second and a check a hundred, every line says batch_size a second."""
    now = itertools.count()
    clock = {"time": 0.0}
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock["time"])

    def slow(step):
        def taking_a_second(state, batch):
            clock["time"] += 1.0
            return step(state, batch)

        return taking_a_second

    def slow_recall(model, processor, pairs, embeds):
        clock["time"] += 100.0
        return {"text_to_picture_R@1": float(next(now))}

    monkeypatch.setattr(run_folder, "validation_recall", slow_recall)
    # 3 steps an epoch: checks fall between lines
    result = run(short_clip(), {"log_every": 2, "evaluate_every": 1}, wrap=slow)
    assert [line["examples_per_second"] for line in result.history if "loss" in line] == [4.0] * 6


# --- Stopped, or gone wrong ----------------------------------------------------------------------------------------


def test_ctrl_c_while_it_logs_leaves_a_usable_checkpoint(tmp_path, capsys):
    def stop(history):
        if history[-1]["step"] == 9:
            signal.raise_signal(signal.SIGINT)

    clip = short_clip()
    result = run(clip, out=tmp_path / "run", on_log=stop, config={"epochs": 100, "evaluate_every": 1000})
    assert result.interrupted and "interrupted at step 9" in capsys.readouterr().out
    last, processor = load_clip(tmp_path / "run" / "last")
    assert_equal_weights(last, result.model)
    assert np.isfinite(validation_recall(last, processor, tiny_pairs(6))["text_to_picture_R@1"])
    assert [line["step"] for line in read_lines(tmp_path / "run")] == [3, 6, 9]


def test_ctrl_c_while_it_computes_leaves_a_usable_checkpoint(tmp_path):
    """Most of the time a run is inside the compiled step, which has already given its old state's memory away."""
    calls = itertools.count(1)

    def interrupting(step):
        def interrupted(state, batch):
            result = jax.block_until_ready(step(state, batch))
            if next(calls) == 1:
                signal.raise_signal(signal.SIGINT)  # as the keyboard does it, before the loop has its new state
            return result

        return interrupted

    handler = signal.getsignal(signal.SIGINT)
    result = run(short_clip(), {"epochs": 100, "evaluate_every": 1000}, out=tmp_path, wrap=interrupting)
    assert result.interrupted
    assert signal.getsignal(signal.SIGINT) is handler
    last, processor = load_clip(tmp_path / "last")
    assert_equal_weights(last, result.model)
    assert np.isfinite(validation_recall(last, processor, tiny_pairs(6))["text_to_picture_R@1"])


def test_ctrl_c_after_a_check_returns_the_best(tmp_path):
    def stop(history):
        if history[-1]["step"] == 9:
            signal.raise_signal(signal.SIGINT)

    result = run(short_clip(), out=tmp_path, on_log=stop)  # a check at step 6
    assert result.interrupted
    assert_equal_weights(load_clip(tmp_path / "best")[0], result.model)
    assert load_clip(tmp_path / "last")


def poisoned_at(number):
    """A wrap of the step that makes one weight NaN after that step, so that the loss is NaN from the next on."""
    calls = itertools.count(1)

    def poisoning(step):
        def poisoned(state, batch):
            state, values = step(state, batch)
            if next(calls) == number:
                nan = state.params["logit_scale"].replace(jnp.asarray(np.nan, jnp.float32))
                state.params["logit_scale"] = nan
            return state, values

        return poisoned

    return poisoning


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):  # checked and saved at 6
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 9: .*lower learning_rate"):
        run(short_clip(), out=tmp_path, wrap=poisoned_at(7))
    assert np.isfinite(weights(load_clip(tmp_path / "best")[0])["logit_scale"])
    assert [line["step"] for line in read_lines(tmp_path)] == [3, 6, 6]


@pytest.mark.parametrize("validation", [True, False])
def test_nan_weights_never_replace_the_best(tmp_path, validation):
    """The loss is logged seldom here: a check comes first, and must not save what is broken."""
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        run(short_clip(), {"log_every": 100}, validation=validation, out=tmp_path, wrap=poisoned_at(7))
    assert np.isfinite(weights(load_clip(tmp_path / "best")[0])["logit_scale"])


def test_a_wild_learning_rate_is_said_so():
    with pytest.raises(FloatingPointError, match="lower learning_rate or clip_norm"):
        run(short_clip(), {"learning_rate": 1e30, "log_every": 1, "epochs": 20})


def test_a_batch_of_one_pair_is_refused():
    with pytest.raises(ValueError, match="batch_size is 1.*at least 2 pairs"):
        run(short_clip(), {"batch_size": 1})


def test_validation_pictures_of_another_size_stop_before_the_first_step():
    with pytest.raises(ValueError, match="validation pictures have 32 pixels a side and the model takes 16"):
        fit(*short_clip(), tiny_pairs(12), tiny_pairs(12, size=32), FitConfig(**QUICK), seed=0, mesh=make_mesh(1),
            progress=False)


def test_a_log_that_fails_at_the_end_leaves_the_last_checkpoint_to_be_written(tmp_path, monkeypatch):
    run = RunFolder(tmp_path, {}, tiny_processor(), np.float32, keeps_states=True)
    closed, close = [], run.states.close

    def fail():
        raise OSError("no network")

    monkeypatch.setattr(run.lines, "close", fail)
    monkeypatch.setattr(run.states, "close", lambda: closed.append(close()))
    with pytest.raises(OSError, match="no network"):
        run.close()
    assert closed


def test_where_to_go_on_after_a_failure_is_what_resuming_allows(tmp_path, monkeypatch):
    """A resumed run refuses other settings, and with the same ones it would fail again."""
    run = RunFolder(tmp_path, {}, tiny_processor(), np.float32, keeps_states=True)
    assert run.kept == "nothing was saved before it"
    monkeypatch.setattr(run.states, "latest", lambda: 500)
    assert "step 500" in run.kept and "start in a new folder" in run.kept and "best" not in run.kept
    run.best = short_clip()[0]
    assert run.kept.endswith(f"from the weights in {tmp_path / 'best'}")
    run.close()


def test_an_empty_caption_stops_before_it_is_learned():
    pairs = tiny_pairs(12)
    pairs.names[5] = ""
    with pytest.raises(ValueError, match="empty caption"):
        run(short_clip(), pairs=pairs, validation=False)


def test_the_warm_up_is_a_share_of_the_steps():
    result = run(short_clip(), {"warmup": 0.5, "log_every": 1}, validation=False)  # 6 of 12 steps
    rates = [line["learning_rate"] for line in result.history if "loss" in line]
    np.testing.assert_allclose(rates[:7], 1e-2 * np.arange(7) / 6, rtol=1e-5)
    assert (np.diff(rates[6:]) < 0).all()


def captions_feed(ids, act=lambda: None):
    """A model, and a feed whose batches have these captions, one row of them after the other; the first calls `act`."""
    clip = short_clip()
    made = list(itertools.islice(dictionary_feed(tiny_pairs(12), clip[1].tokenize, 4, seed=0, length=16).dataset, 12))

    def make(step):
        if step == 0:
            act()
        return made[step % 12] | {"caption_ids": np.repeat(np.int32([ids[step % len(ids)]]).T, 2, axis=1)}

    return clip, Feed(Steps(make), 4, 3)


def test_shared_captions_are_counted_once(capsys):
    """In the batches until the first line of the log: 2, 4 and 0 pairs of 4."""
    clip, feed = captions_feed([[1, 1, 2, 3], [1, 2, 2, 1], [1, 2, 3, 4], [1, 1, 1, 1]])
    fit(*clip, feed, None, FitConfig(**QUICK), seed=0, progress=False, mesh=make_mesh(1))
    said = [line for line in capsys.readouterr().out.splitlines() if "share" in line]
    assert said == ["6 of the first 12 pairs share their caption with a pair of their batch: both are right answers"]


def test_a_small_set_is_one_batch(tmp_path, capsys):
    result = run(short_clip(), {"batch_size": 256, "epochs": 2}, out=tmp_path, mesh=make_mesh(8), validation=False)
    assert [line["examples"] for line in result.history if "loss" in line] == [16]  # two steps of 8
    assert json.loads((tmp_path / "fit.json").read_text())["batch_size"] == 8
    assert "batch_size 256 is more than the 12 pictures: it is now 8" in capsys.readouterr().out
    with pytest.raises(ValueError, match="7 pictures do not fill a batch of 8: use more pictures, fewer devices"):
        run(short_clip(), {"batch_size": 256}, pairs=tiny_pairs(7), mesh=make_mesh(8), validation=False)


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"steps": -1}])
def test_nothing_to_train_is_an_error(changes):
    with pytest.raises(ValueError, match="nothing to train: choose at least 1"):
        run(short_clip(), changes, validation=False)


def test_a_trained_model_is_not_overwritten_unless_the_caller_says_so(tmp_path):
    first = run(short_clip(), {"epochs": 1}, out=tmp_path / "run")
    for options, way in (({}, "no checkpoint to resume from"), ({"resume": True}, "no checkpoint to resume from")):
        with pytest.raises(FileExistsError, match=f"run has a trained model .best. and {way}: replace it .overwrite="):
            run(short_clip(seed=1), {"epochs": 1}, out=tmp_path / "run", **options)
    assert_equal_weights(load_clip(tmp_path / "run" / "best")[0], first.model)
    second = run(short_clip(seed=1), {"epochs": 1, "checkpoint_every": 2}, out=tmp_path / "run", overwrite=True)
    assert_equal_weights(load_clip(tmp_path / "run" / "best")[0], second.model)
    with pytest.raises(FileExistsError, match=r"has a run at step 3: continue it .resume=True, --resume., replace it"):
        run(short_clip(), {"epochs": 1, "checkpoint_every": 2}, out=tmp_path / "run")
    third = run(short_clip(), {"epochs": 1, "checkpoint_every": 2}, out=tmp_path / "run", overwrite=True)
    assert_equal_weights(third.model, first.model)


def test_an_evaluation_embeds_the_pictures_once(tmp_path, monkeypatch):
    """Also for the picture of samples."""
    seen, real = [], run_folder.embed_pictures
    monkeypatch.setattr(run_folder, "embed_pictures", lambda *args, **options:
                        seen.append(len(args[2])) or real(*args, **options))
    run(short_clip(), {"epochs": 2}, out=tmp_path, samples=("kucing tidur", "mobil merah"))
    assert seen == [12] and (tmp_path / "samples" / "step_000006.png").is_file()


def test_only_the_first_process_evaluates(tmp_path, monkeypatch):
    folder = RunFolder(None, {}, tiny_processor(), np.float32)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(run_folder, "embed_pictures", lambda *args: pytest.fail("it embeds"))
    monkeypatch.setattr(run_folder, "from_first", lambda value: {"text_to_picture_R@1": 0.5})
    folder.evaluate(tiny_pairs(12), ["kucing"], short_clip()[0], {"step": 3})
    assert folder.lines.history == [{"step": 3, "text_to_picture_R@1": 0.5}] and folder.best_recall == 0.5


def test_the_bar_says_that_the_first_step_compiles(capsys):
    run(short_clip(), {"epochs": 1}, validation=False, progress=True)
    shown = capsys.readouterr().err
    assert "compiling:   0%" in shown and "training: 100%" in shown


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path, capsys):
    def stopping(make_update, mesh):
        placed = jit_form(make_update, mesh)
        return placed._replace(step=lambda state, batch: pytest.fail("it takes a step"))

    clip, feed = captions_feed([[1, 2, 3, 4]], act=lambda: signal.raise_signal(signal.SIGINT))
    result = fit(*clip, feed, None, FitConfig(**QUICK), seed=0, out=tmp_path, progress=False, mesh=make_mesh(1),
                 form=stopping)
    assert result.interrupted and result.history == []
    assert "interrupted at step 0 of 12" in capsys.readouterr().out


def test_cut_captions_are_counted_in_the_log():
    clip, pairs = short_clip(), tiny_pairs(12)
    with pytest.warns(UserWarning, match="texts are cut to 4 tokens"):
        result = run(clip, {"caption_tokens": 4}, pairs=pairs, validation=False)
    counts = [line["truncated"] for line in result.history if "loss" in line]
    assert counts[0] > 0 and counts == sorted(counts) and counts[-1] <= clip[1].truncated

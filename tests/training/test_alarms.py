"""The alarms: each rings for its cause, once, with a remedy, and a healthy run is silent."""

import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import batches, short_clip, tiny_batch, tiny_clip, tiny_pairs, tiny_processor

from clipid_utils.paths import CHECKPOINTS
from clipid_utils.training import loop
from clipid_utils.training.alarms import LINES, Alarms, check_finite, spread
from clipid_utils.training.loop import Clock
from clipid_utils.training.optimizers import adamw
from clipid_utils.training.step import init_state, make_step

CHANCE = math.log(256)
HEALTHY = {"step": 1000, "epoch": 5, "loss": 2.0, "log_batch": CHANCE, "logit_scale": 3.0, "gradient_norm": 1.0,
           "learning_rate": 1e-3, "data_wait_fraction": 0.02, "truncated": 3, "examples": 256_000, "image_spread": 0.6,
           "text_spread": 0.6, "bad_step": -1}


def lines(count=LINES, **changes):
    return [{**HEALTHY, "step": HEALTHY["step"] + 10 * i, **changes} for i in range(count)]


def rung(alarms, *parts):
    """The names of the alarms that begin in these lines, in order."""
    return [new["alarm"] for part in parts for line in part for new in alarms(line)]


def alarms(**options):
    return Alarms(steps=4000, warmup=200, **options)


# --- Made-up lines -------------------------------------------------------------------------------------------------


CAUSES = {
    "stuck": ({"loss": 0.99 * CHANCE}, r"log\(batch\) = 5.545.*try three times the learning_rate \(now 0.001\)"),
    "collapsed": ({"text_spread": 0.001}, r"all text embeddings \(spread 0.001\).*longer warmup"),
    "truncated": ({"truncated": 7680}, r"3\.0% of the captions were cut.*raise caption_tokens"),
    "data_wait": ({"data_wait_fraction": 0.25}, "25% of the time.*raise workers"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAUSES)
def test_an_alarm_comes_once_with_its_remedy_and_again_after_recovery(name):
    changes, message = CAUSES[name]
    watch = alarms()
    found = [new for line in lines(3 * LINES, **changes) for new in watch(line)]
    assert [new["alarm"] for new in found] == [name] and found[0]["step"] >= 1000
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found[0]["message"])
    assert rung(watch, lines(LINES)) == []
    assert rung(watch, lines(2 * LINES, **changes)) == [name]


@pytest.mark.parametrize("name, below, above", [
    ("stuck", {"loss": 0.975 * CHANCE}, {"loss": 0.985 * CHANCE}),
    ("collapsed", {"image_spread": 0.011}, {"image_spread": 0.009}),
    ("truncated", {"truncated": 2500}, {"truncated": 2600}),  # of 256,000 captions
    ("data_wait", {"data_wait_fraction": 0.09}, {"data_wait_fraction": 0.11}),
])
def test_each_threshold_is_where_it_is_said_to_be(name, below, above):
    assert rung(alarms(), lines(**below)) == []
    assert rung(alarms(), lines(**above)) == [name]


@pytest.mark.parametrize("steps, warmup, after", [(40, 2, 52), (160, 8, 58), (1500, 75, 225), (9000, 450, 650)])
def test_a_loss_is_judged_only_after_enough_steps(steps, warmup, after):
    """A tenth of the run after the warm-up, 50 to 200 steps; of a run that is shorter nothing is said."""
    history = [{**HEALTHY, "step": step, "loss": CHANCE} for step in range(1, after + LINES + 1)]
    watch = Alarms(steps, warmup)
    assert rung(watch, history[:-1]) == [] and rung(watch, history[-1:]) == ["stuck"]


def test_a_feed_that_devices_wait_for_is_measured_and_rings(monkeypatch):
    """But not one that is as slow behind steps that are slower."""

    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])

    def feed():
        while True:
            now[0] += 0.02
            yield {}

    def shares(ready):
        clock, found, running = Clock(), [], mock.Mock(spec=jax.Array, is_ready=lambda: ready)
        for _ in range(LINES):
            for _ in range(2):
                clock.next(feed(), running, batch_size=8)
            now[0] += 0.04
            found.append(clock.rates()["data_wait_fraction"])
            clock.restart()
        return found

    waited, hidden = shares(True), shares(False)
    assert waited == pytest.approx([0.5] * LINES) and max(hidden) == 0
    watch = alarms()
    assert rung(watch, [{**line, "data_wait_fraction": share} for line, share in zip(lines(LINES), hidden, strict=True)]
                ) == []
    assert rung(watch, [{**line, "data_wait_fraction": share} for line, share in zip(lines(LINES), waited, strict=True)]
                ) == ["data_wait"]


def test_healthy_lines_raise_no_alarm():
    assert rung(alarms(), lines(50)) == []


def test_the_shipped_run_raises_no_alarm():
    """Its lines are older than some keys, and hold the evaluations too."""
    history = [json.loads(line) for line in (CHECKPOINTS / "mini" / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((CHECKPOINTS / "mini" / "fit.json").read_text())
    steps = history[-1]["step"]
    watch = Alarms(steps, round(config["warmup"] * steps))
    assert len(history) > 200 and rung(watch, history) == []
    for line in history:
        check_finite(line)


def test_all_causes_at_once_are_all_named():
    changes = {key: value for changes, _ in CAUSES.values() for key, value in changes.items()}
    assert sorted(rung(alarms(), lines(**changes))) == sorted(CAUSES)


def test_the_loss_and_the_embeddings_are_not_judged_during_warmup():
    early = [{**line, "step": line["step"] - 800} for line in lines(20, loss=CHANCE, image_spread=0.001)]
    watch = alarms()
    assert early[-1]["step"] < 400 and rung(watch, early) == []
    late = [{**line, "step": 500} for line in early]
    assert sorted(rung(watch, late)) == ["collapsed", "stuck"]


def test_one_slow_read_or_one_bad_batch_is_no_alarm():
    assert rung(alarms(), lines(), lines(1, data_wait_fraction=0.4, loss=CHANCE), lines()) == []


@pytest.mark.parametrize("positives", [1, 2, 16, 128])
def test_the_least_possible_loss_is_not_stuck_whatever_the_mask(positives):
    """With k right answers a row the loss cannot fall below log k, where a run that has learned all ends."""
    assert rung(alarms(), lines(loss=math.log(positives))) == []


def test_a_loss_where_guessing_costs_something_else_is_not_judged():
    assert rung(alarms(chance_is_log_batch=False), lines(loss=1.2 * CHANCE)) == []


# --- Real causes ---------------------------------------------------------------------------------------------------


def test_a_learning_rate_of_zero_is_stuck_and_a_good_one_is_not():
    """The first half of the steps has a rate of 0, the second a good one."""
    model, processor = short_clip()
    steps = 60
    transform = adamw(lambda step: jnp.where(step < steps, 0.0, 1e-2), 0.0, 1.0)
    graph, state = init_state(model, transform, 0)
    step = make_step(graph, transform, image_mean=processor.image_mean, image_std=processor.image_std,
                     augmentation=None)
    rung = []
    for half in range(2):
        watch, names = Alarms(steps, 3), []
        for done in range(1, steps + 1):
            (batch,) = batches(tiny_pairs(12), processor.tokenize, 12, seed=0, epoch=half * steps + done, length=16)
            state, values = step(state, batch)
            line = {"step": done, "log_batch": math.log(12), "learning_rate": 0.0}
            line |= {name: float(x) for name, x in values.items()}
            names += [new["alarm"] for new in watch(line)]
        rung.append(names)
    assert "stuck" in rung[0]  # and perhaps collapsed: random towers may start with one vector for all texts
    assert rung[1] == []


def test_one_picture_and_one_caption_a_batch_are_collapsed():
    model, processor = tiny_clip()
    batch, same = tiny_batch(processor), np.zeros(8, int)
    pixels = jnp.asarray(processor.normalize(batch["images"]))

    def line(rows):
        image = spread(model.encode_image(pixels[rows]))
        text = spread(model.encode_text(batch["input_ids"][rows], batch["attention_mask"][rows]))
        return {**HEALTHY, "image_spread": float(image), "text_spread": float(text)}

    assert rung(alarms(), [line(np.arange(8))]) == []
    found = alarms()(line(same))
    assert [new["alarm"] for new in found] == ["collapsed"]
    assert "all image embeddings" in found[0]["message"] and "and text embeddings" in found[0]["message"]


def test_cut_captions_are_those_the_tokenizer_counts():
    processor = tiny_processor()
    with pytest.warns(UserWarning, match="texts are cut to 4 tokens"):
        processor.tokenize(tiny_pairs(12).names, 4)
    line = {**HEALTHY, "truncated": processor.truncated, "examples": 12}
    assert processor.truncated > 0 and rung(alarms(), [line]) == ["truncated"]


# --- Spread --------------------------------------------------------------------------------------------------------


def test_spread_is_the_mean_distance_of_all_pairs():
    embeds = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    embeds /= np.linalg.norm(embeds, axis=1, keepdims=True)
    value = jax.jit(spread)(jnp.asarray(embeds))
    assert value.shape == () and float(value) == pytest.approx((1 - embeds @ embeds.T).mean(), abs=1e-6)
    assert float(spread(jnp.asarray(np.repeat(embeds[:1], 9, axis=0)))) == pytest.approx(0, abs=1e-6)
    assert float(spread(jnp.eye(4)[jnp.array([0, 1])] * jnp.array([[1.0], [1.0]]))) == pytest.approx(0.5)
    assert float(spread(jnp.concatenate([embeds, -embeds]))) == pytest.approx(1)
    assert spread(jnp.asarray(embeds, jnp.bfloat16)).dtype == jnp.float32


# --- No number -----------------------------------------------------------------------------------------------------


def test_what_is_finite_passes():
    check_finite(HEALTHY)
    check_finite({"step": 3, "loss": 1.0, "gradient_norm": 2.0})


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"gradient_norm": math.inf}, {"logit_scale": math.nan},
                                     {"bad_step": 0}])
def test_what_is_not_finite_stops_the_run_with_a_remedy(changes):
    with pytest.raises(FloatingPointError, match="at step 1000.*lower learning_rate or clip_norm.*nothing was saved"):
        check_finite({**HEALTHY, **changes})
    with pytest.raises(FloatingPointError, match="the best weights before it are in run/best$"):
        check_finite({**HEALTHY, **changes}, "the best weights before it are in run/best")

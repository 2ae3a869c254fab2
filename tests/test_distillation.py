"""Distillation: the loss against a NumPy loop, a student that lands where its teacher does, and what stops it."""

import dataclasses
import os
import signal

import distillation as module
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distillation import (
    DistillConfig,
    Parallel,
    distill,
    distillation_loss,
    held_out,
    make_distill_update,
    parallel_features,
    text_features,
    with_text_tower,
)
from flax import nnx
from tiny import CONFIG, NAMES, tiny_clip, tiny_processor

from clipid_utils import CLIPProcessor, load_clip, save_clip
from clipid_utils.model.clip import TextEncoder
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training.step import init_state

ENGLISH = ["sleeping cat", "seal", "blue butterfly", "red car", "big house", "small fish", "left arrow", "rose",
           "old bicycle", "sailing boat", "volcano", "watermelon"]
CONFIG_TEXT = dataclasses.replace(CONFIG.text, width=24, layers=1)  # of another size than the teacher's


def new_student(seed: int = 5, embed_dim: int = 8) -> TextEncoder:
    return TextEncoder(CONFIG_TEXT, embed_dim, rngs=nnx.Rngs(seed))


def taught() -> Parallel:
    """Features that differ as a trained teacher's do; random weights give all texts nearly the same."""
    return Parallel(ENGLISH, NAMES, np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32))


def weights(tower) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in flatten_params(nnx.state(tower, nnx.Param)).items()}


def run(validation=None, *, train=None, student=None, seed=0, **changes):
    config = DistillConfig(**{"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, **changes})
    return distill(student or new_student(), tiny_processor(), train or taught(), validation, config, seed=seed,
                   progress=False)


def test_the_loss_is_the_mean_of_squares():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 5, 3)).astype(np.float32)
    total = 0.0
    for row in range(5):
        for column in range(3):
            total += (float(student[row, column]) - float(teacher[row, column])) ** 2
    assert float(distillation_loss(jnp.asarray(student), jnp.asarray(teacher))) == pytest.approx(total / 15, rel=1e-6)


def test_the_teachers_features_are_those_before_the_norm():
    model, processor = tiny_clip()
    pairs = parallel_features(model.text, processor, ENGLISH, NAMES, batch_size=5)
    np.testing.assert_allclose(pairs.features, model.text(**processor.tokenize(ENGLISH)), atol=1e-5)
    assert not np.allclose(np.linalg.norm(pairs.features, axis=1), 1)


@pytest.mark.parametrize("languages", [1, 2])
def test_a_step_goes_down_the_sum_of_the_languages(languages):
    student, processor, train = new_student(), tiny_processor(), taught()
    texts = [processor.tokenize(part, 16) for part in (NAMES, ENGLISH)[:languages]]
    optimizer = optax.sgd(0.1)
    graph, state = init_state(student, optimizer, 0)
    params = jax.tree.map(jnp.copy, state.params)

    def plain(params):
        tower = nnx.merge(graph, params)
        return sum(jnp.mean((tower(**part) - train.features) ** 2) for part in texts)

    loss, gradients = jax.jit(jax.value_and_grad(plain))(params)
    batch = {name: np.stack([part[name] for part in texts], axis=1) for name in ("input_ids", "attention_mask")}
    after, values = jax.jit(make_distill_update(graph, optimizer))(state, batch | {"features": train.features})
    assert float(values["loss"]) == pytest.approx(float(loss), rel=1e-5)
    expected = flatten_params(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients))
    for name, value in flatten_params(after.params).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)


def test_the_student_lands_where_the_teacher_does():
    result = run(taught(), epochs=60, batch_size=12, evaluate_every=20, log_every=1)
    losses = [line["loss"] for line in result.history if "loss" in line]
    assert losses[0] > 1.5 and losses[-1] < 0.1
    figures = held_out(result.student, tiny_processor(), taught())
    assert figures["cosine"] > 0.95 and figures["R@1"] == 1.0
    assert [line["epoch"] for line in result.history if "R@1" in line] == [20, 40, 60]


def test_english_is_learned_only_where_it_is_taught():
    cosines = {}
    for both in (True, False):
        student = run(epochs=60, batch_size=12, both_languages=both).student
        own = text_features(student, tiny_processor(), ENGLISH)
        theirs = taught().features
        norms = np.linalg.norm(own, axis=1) * np.linalg.norm(theirs, axis=1)
        cosines[both] = ((own * theirs).sum(axis=1) / norms).mean()
    assert cosines[True] > 0.9 and cosines[False] < 0.7, cosines


def test_the_best_student_is_kept_not_the_last(monkeypatch):
    recalls = iter([0.2, 0.6, 0.6, 0.1])
    seen = []

    def measured(student, processor, pairs):
        seen.append(weights(student))
        return {"cosine": 0.0, "R@1": next(recalls)}

    monkeypatch.setattr(module, "held_out", measured)
    result = run(taught(), epochs=4)
    for name, value in weights(result.student).items():
        np.testing.assert_array_equal(value, seen[2][name])
    assert not np.array_equal(seen[2]["projection.kernel"], seen[3]["projection.kernel"])


def test_equal_sentences_are_right_for_each_other():
    """Two names with one translation cannot be told apart, and need not be."""
    train = taught()
    pairs = Parallel(["cat", "kitty", "dog"], [NAMES[0], NAMES[0], NAMES[1]], train.features[[0, 0, 1]])
    student = run(train=train, epochs=60, batch_size=12).student
    assert held_out(student, tiny_processor(), pairs)["R@1"] == 1.0


def test_the_student_given_is_left_as_it_was_and_the_seed_decides():
    student = new_student()
    before = weights(student)
    first, same, other = (run(student=student, seed=seed).student for seed in (0, 0, 1))
    for name, value in weights(student).items():
        np.testing.assert_array_equal(value, before[name])
        np.testing.assert_array_equal(weights(first)[name], weights(same)[name])
    assert not np.array_equal(weights(first)["projection.kernel"], weights(other)["projection.kernel"])


def test_ctrl_c_leaves_what_is_there(monkeypatch):
    real = module.make_distill_update

    def interrupting(graph, optimizer):
        update = real(graph, optimizer)
        return lambda state, batch: (jax.debug.callback(interrupt, state.step), update(state, batch))[1]

    def interrupt(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module, "make_distill_update", interrupting)
    result = run(epochs=10, log_every=1)
    assert result.interrupted and result.history[-1]["step"] in (2, 3)
    assert np.isfinite(text_features(result.student, tiny_processor(), NAMES)).all()


def test_a_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(FloatingPointError, match="at step 1: "):
        run(train=taught()._replace(features=np.full((12, 8), np.nan, np.float32)), log_every=1)


def test_widths_and_counts_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="gives 6 numbers and the teacher's 8: make it with embed_dim 8"):
        run(student=new_student(embed_dim=6))
    with pytest.raises(ValueError, match="epochs or steps is 0"):
        run(epochs=0)
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="2 English and 1 Indonesian"):
        parallel_features(model.text, processor, ["cat", "dog"], ["kucing"])


def test_a_student_becomes_the_models_text_tower(tmp_path):
    model, processor = tiny_clip()
    student = run().student
    joined = with_text_tower(model, student)
    tokens = processor.tokenize(NAMES)
    features = np.asarray(student(**tokens))
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(joined.encode_text(**tokens), expected, atol=1e-5)
    assert joined.config.text.width == 24 and model.config.text.width == 16
    save_clip(joined, processor, tmp_path / "joined")
    again, _ = load_clip(tmp_path / "joined")
    np.testing.assert_allclose(again.encode_text(**tokens), expected, atol=1e-5)
    with pytest.raises(ValueError, match="gives 6 numbers and the model's 8"):
        with_text_tower(model, new_student(embed_dim=6))


@pytest.mark.parametrize("changes", [
    {"pre_norm": True, "mask": "none", "pooling": "last", "projection": "affine", "token_types": 0},  # SigLIP's
    {"pre_norm": True, "mask": "causal", "pooling": "end", "token_types": 0},  # CLIP's
    {"pooling": "mean", "projection": "mlp"},  # open_clip's XLM-RoBERTa
], ids=["SigLIP", "CLIP", "open_clip"])
def test_a_teacher_of_any_family(changes):
    """The teacher has its own tokenizer and rules for texts; the student has other ones."""
    teacher, _ = tiny_clip(text=dataclasses.replace(CONFIG.text, **changes))
    known = tiny_processor()
    processor = CLIPProcessor(known.tokenizer, known.image_size, CONFIG.text.max_length,
                              fixed_length=changes.get("mask") == "none")
    pairs = parallel_features(teacher.text, processor, ENGLISH, NAMES)
    np.testing.assert_allclose(pairs.features, teacher.text(**processor.tokenize(ENGLISH)), atol=1e-5)
    student = run(train=pairs, epochs=30).student
    before, after = (held_out(tower, tiny_processor(), pairs)["cosine"] for tower in (new_student(), student))
    assert after > before + 0.1
    joined = with_text_tower(teacher, student)
    assert joined.encode_text(**tiny_processor().tokenize(NAMES)).shape == (12, 8)

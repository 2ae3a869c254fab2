"""Fine-tuning: what is held out, what learns, that it learns, that it does no harm, and the models in between."""

import dataclasses
import json

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tiny import SIZE, short_clip

from clipid_utils import CLIPProcessor, load_clip, save_clip
from clipid_utils.files import write_json_lines
from clipid_utils.model.config import TextConfig
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.model.processor import train_wordpiece
from clipid_utils.training.tune import TuneRecipe, held_out, matches, mixture, run_tune, trainable

THINGS = [f"{name} {colour}" for name in ("kotak", "bola", "topi", "kursi") for colour in
          ("merah", "biru", "hijau", "kuning", "ungu")]


def params(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """200 pictures of 20 things. All pictures of a thing have its colours, with noise, and the same one caption."""
    folder, rng = tmp_path_factory.mktemp("things"), np.random.default_rng(0)
    blocks, rows = rng.integers(0, 256, (len(THINGS), 4, 4, 3)), []
    for number in range(200):
        noisy = blocks[number % 20] + rng.normal(0, 25, (4, 4, 3))
        pixels = np.kron(noisy, np.ones((SIZE // 4, SIZE // 4, 1))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"image_path": f"{number}.png", "captions": [THINGS[number % 20]]})
    write_json_lines(folder / "captions.jsonl", rows)
    write_json_lines(folder / "few.jsonl", rows[:24])
    return folder


def new_model(seed: int = 0, **changes):
    """Random weights, and a tokenizer that knows the words."""
    model, _ = short_clip(seed, **changes)
    return model, CLIPProcessor(train_wordpiece(THINGS, 300), SIZE, 16)


@pytest.fixture(scope="module")
def taught(things, tmp_path_factory):
    """The folder of a model that learnt the things from random weights: this is the first test too."""
    folder = tmp_path_factory.mktemp("taught")
    save_clip(*new_model(), folder / "random")
    assert run_tune(recipe(things, folder / "random", folder / "run", learn="all", learning_rate=1e-2, steps=80))
    found = report(folder / "run")
    assert found["before"] < 0.3 and found["after"] > 0.4 and found["difference"]["low"] > 0
    return folder / "run" / "model"


@pytest.fixture(scope="module")
def start(taught, tmp_path_factory):
    """The folder of that model with its text projection lost."""
    folder = tmp_path_factory.mktemp("start")
    model, processor = load_clip(taught)
    model.text.projection.kernel[...] = new_model(1)[0].text.projection.kernel[...]
    save_clip(model, processor, folder)
    return folder


def recipe(things, start, out, **changes) -> TuneRecipe:
    settings = {"train": str(things / "captions.jsonl"), "init": str(start), "out": out, "batch_size": 64} | changes
    return TuneRecipe(**settings)


def report(out) -> dict:
    return json.loads((out / "model" / "tune.json").read_text())


# It learns

@pytest.mark.slow
@pytest.mark.parametrize("learn", ["heads", "lora", "blocks", "all"])
def test_it_learns_from_captions_that_repeat(things, start, tmp_path, learn, capsys):
    """Pictures with the same caption must not be each other's negatives."""
    assert run_tune(recipe(things, start, tmp_path, learn=learn, learning_rate=1e-2, steps=40))
    found = report(tmp_path)
    assert found["after"] > found["before"] + 0.1 and found["difference"]["low"] > 0
    said = capsys.readouterr().out
    assert f"before: MRR {found['before']:.3f}" in said and f"after: MRR {found['after']:.3f}" in said
    tuned, untuned = (params(load_clip(folder)[0]) for folder in (tmp_path / "model", start))
    assert tuned.keys() == untuned.keys()
    changed = {name for name in tuned if not np.array_equal(tuned[name], untuned[name])}
    if learn == "heads":
        assert changed <= {"vision.projection.kernel", "text.projection.kernel", "logit_scale"}
    if learn == "lora":
        assert "text.blocks.0.attn.q_proj.kernel" in changed and "text.word_embedding" not in changed
    if learn == "all":
        assert "text.word_embedding" in changed


def test_a_frozen_tower_stays(things, start, tmp_path):
    run_tune(recipe(things, start, tmp_path, learn="blocks", freeze="vision", learning_rate=1e-2, steps=20))
    tuned, untuned = (params(load_clip(folder)[0]) for folder in (tmp_path / "model", start))
    for name in untuned:
        if name.startswith("vision."):
            np.testing.assert_array_equal(tuned[name], untuned[name], err_msg=name)


def test_a_model_with_a_bias_learns_by_its_own_loss(things, tmp_path):
    save_clip(*new_model(logit_bias=-10.0), tmp_path / "start")
    run_tune(recipe(things, tmp_path / "start", tmp_path / "run", learning_rate=1e-2, steps=40))
    tuned, _ = load_clip(tmp_path / "run" / "model")
    assert float(tuned.logit_bias[...]) != -10.0


# It does no harm

@pytest.mark.parametrize("learn", ["heads", "all"])
def test_a_run_that_makes_it_worse_keeps_the_start(things, taught, tmp_path, learn, capsys):
    run_tune(recipe(things, taught, tmp_path / "bad", learn=learn, learning_rate=3.0, steps=8))
    assert "no step was better than the start" in capsys.readouterr().out
    before, after = (params(load_clip(folder)[0]) for folder in (taught, tmp_path / "bad" / "model"))
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_a_run_ends_early_when_it_does_not_improve(things, taught, tmp_path):
    run_tune(recipe(things, taught, tmp_path, learning_rate=3.0, steps=200))
    lines = [json.loads(line) for line in (tmp_path / "fit" / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) < 100


def test_interpolation(things, start, tmp_path, capsys):
    run_tune(recipe(things, start, tmp_path, learning_rate=1e-2, steps=40, interpolate=True))
    found = report(tmp_path)
    curve = {row["share"]: row["MRR"] for row in found["interpolation"]}
    assert list(curve) == [round(0.1 * tenth, 1) for tenth in range(11)]
    assert curve[0.0] == pytest.approx(found["before"]) and max(curve.values()) == pytest.approx(found["after"])
    assert "0.5 of the way" in capsys.readouterr().out


def test_mixtures_are_between_the_two():
    (first, _), (second, _) = short_clip(0), short_clip(1)
    ends = [params(model) for model in (first, second)]
    for share in (0.0, 0.25, 1.0):
        mixed = params(mixture(first, second, share))
        for name in mixed:
            np.testing.assert_allclose(mixed[name], (1 - share) * ends[0][name] + share * ends[1][name], atol=1e-6)


# What is held out, and what is right

@pytest.mark.parametrize("count, size", [(8, 2), (23, 5), (100, 25), (200, 50), (1000, 100)])
def test_held_out(count, size):
    rows = held_out(count, 0)
    assert len(rows) == len(set(rows)) == size and rows.max() < count
    assert (rows != held_out(count, 1)).any()


def test_too_few_pictures(things, start, tmp_path):
    write_json_lines(things / "five.jsonl", [{"image_path": f"{n}.png", "captions": ["bola"]} for n in range(5)])
    with pytest.raises(ValueError, match="5 pictures are too few.*--validation"):
        run_tune(recipe(things, start, tmp_path, train=str(things / "five.jsonl")))


def test_matches():
    captions, right = matches([["Kucing", "hewan"], ["anjing", "hewan"], ["kucing"]])
    assert captions == ["Kucing", "hewan", "anjing"]
    np.testing.assert_array_equal(right, [[1, 0, 1], [1, 1, 0], [0, 1, 0]])


def test_validation_of_its_own(things, start, tmp_path):
    run_tune(recipe(things, start, tmp_path, validation=str(things / "few.jsonl"), steps=10))
    assert report(tmp_path)["pictures"] == 200 and report(tmp_path)["validation_pictures"] == 24


# What learns

def test_patterns():
    model, _ = short_clip()
    assert trainable(model, "heads") == ("logit_*", "vision.projection.*", "text.projection.*")
    assert trainable(model, "all", "text") == ("logit_*", "vision.*")
    assert trainable(model, "blocks", "vision", 5) == ("logit_*", "text.blocks.0.*", "text.pooler.*",
                                                       "text.projection.*")
    no_heads, _ = short_clip(text=TextConfig(vocab_size=300, width=8, layers=1, heads=2, projection="none"))
    with pytest.raises(ValueError, match="leaves nothing to learn"):
        trainable(no_heads, "heads", "vision")


# Folders

def test_a_second_run_needs_a_folder_of_its_own(things, start, tmp_path):
    run_tune(recipe(things, start, tmp_path, steps=5))
    with pytest.raises(FileExistsError, match="--resume.*--out"):
        run_tune(recipe(things, start, tmp_path, steps=5))
    assert run_tune(recipe(things, start, tmp_path, steps=5, resume=True))
    with pytest.raises(ValueError, match=r"recipe\.json.*learn"):
        run_tune(recipe(things, start, tmp_path, steps=5, resume=True, learn="lora"))


def test_without_records():
    with pytest.raises(ValueError, match="--train captions.jsonl"):
        run_tune(TuneRecipe())


def test_the_settings_are_kept(things, start, tmp_path):
    run_tune(recipe(things, start, tmp_path, steps=5))
    kept = json.loads((tmp_path / "recipe.json").read_text())
    assert kept["learn"] == "heads" and kept["steps"] == 5
    assert kept.keys() == {field.name for field in dataclasses.fields(TuneRecipe)}

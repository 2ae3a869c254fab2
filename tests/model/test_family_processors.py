"""Today's families beside transformers: the same ids, masks and pixels, from the folders that their users have.

Small tokenizers, trained here in each family's format, stand in for the published ones. The models are those of
`test_families.py`, with tables as large as the tokenizers.
"""

import functools
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import sentencepiece
import test_processor_parity as parity
import transformers
from reference import unpack
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2
from test_families import OPEN_CLIP, WHOLE
from test_processor_parity import CORPUS, HALF, TEXTS, noise, photo, pixels_of, write
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from clipid_utils import HybridCLIP, load_clip, load_towers, save_clip
from clipid_utils.model.pretrained.processor_files import TextRules
from clipid_utils.model.pretrained.weights import read_weights
from clipid_utils.model.processor import CLIPProcessor

pytestmark = [pytest.mark.filterwarnings("ignore:.*texts are cut"),
              pytest.mark.filterwarnings("ignore:This sequence already has")]  # SiglipTokenizer, of its own end

NAMED = "[MASK] <mask> [SEP] </s> <pad>"  # special tokens in a text
PLAIN = [*(text for text in TEXTS if "</s>" not in text),
         "Orang-orang berjalan-jalan, sayur-mayur; kemerah-merahan!", "(kucing)  &  [anjing]", "- kucing", "\tkucing",
         "kucing\n", "\u3000kucing", "!!!", "“kutip” — ‘tunggal’ …", "ﷺ ½ ① ﬃ", "한국어 ไทย", "x\x07y",
         "a\u0300 e\u0301", "IT'S KUCING'S 12345", "x" * 300]
ROWS = 700  # words in the models' tables; no tokenizer here has more


# Tokenizers in the format of each family

@functools.cache  # a second training may number the tokens differently
def clip_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's vocabulary and merges: the bytes, the bytes at the end of a word, what was learned, two special tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"),
                                                                            "removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=450, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    words += [*dict.fromkeys(first + second for first, second in merges), "<|startoftext|>", "<|endoftext|>"]
    return {word: row for row, word in enumerate(words)}, merges


def clip(pad: str = "<|endoftext|>") -> dict:
    vocabulary, merges = clip_bpe()
    tokens = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    return {"vocab_json": vocabulary, "merges_txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
            "tokenizer_config_json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 36, "pad_token": pad,
                                      "do_lower_case": True, **tokens}}


@functools.cache
def sentencepieces(**settings) -> bytes:
    """A unigram model of sentencepiece with the letters of T5's: padding 0, end 1, unknown 2, NFKC."""
    model, ids = io.BytesIO(), {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(map(str.lower, CORPUS)), model_writer=model, normalization_rule_name="nmt_nfkc",
        minloglevel=2, hard_vocab_limit=False, **ids | {"vocab_size": 300} | settings)
    return model.getvalue()


def siglip(lower: bool = True, **settings) -> dict:
    return {"spiece.model": sentencepieces(**settings), "tokenizer_config_json": {
        "tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "do_lower_case": lower, "eos_token": "</s>",
        "pad_token": "</s>", "unk_token": "<unk>", "model_input_names": ["input_ids"], "sp_model_kwargs": {}}}


@functools.cache
def gemma(cuts: bool = False, end: str = "$A <eos>") -> dict:
    """Gemma's BPE: spaces are ▁, and letters that are not in the vocabulary are bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    known = (re.sub("[^A-Za-z▁-]", "", text.replace(" ", "▁")) for text in CORPUS)
    tokenizer.train_from_iterator(known, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    trained = json.loads(tokenizer.to_str())
    words = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), *trained["model"]["vocab"]]
    trained["model"]["vocab"] = {word: row for row, word in enumerate(words)}
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = TemplateProcessing(end, special_tokens=[("<eos>", 1), ("<bos>", 2)])
    if cuts:
        tokenizer.enable_truncation(64)
        tokenizer.enable_padding(length=64, pad_id=0, pad_token="<pad>")
    return {"tokenizer_json": tokenizer.to_str(), "tokenizer_config_json": {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": "<bos>" in end, "add_eos_token": True,
        "model_max_length": 10**30, "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
        "unk_token": "<unk>", "mask_token": "<mask>", **({} if cuts else {"padding_side": "right"})}}


@functools.cache
def xlm_r(**settings) -> dict:
    """With NFKC as sentencepiece does it, as in the published file."""
    files = parity.xlm_roberta()
    tokenizer = Tokenizer.from_str(files["tokenizer_json"])
    chars = sentencepiece_model_pb2.ModelProto.FromString(sentencepieces()).normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Precompiled(chars)
    return {"tokenizer_json": tokenizer.to_str(), "tokenizer_config_json": {
        "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512, **parity.ROBERTA_TOKENS, **settings}}


def xlm_r_model() -> dict:
    """As XLM-RoBERTa was before it had a tokenizer.json."""
    return {"sentencepiece.bpe.model": sentencepieces(unk_id=0, bos_id=1, eos_id=2, pad_id=-1),
            "tokenizer_config_json": {"tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 512,
                                      **parity.ROBERTA_TOKENS}}


def bert(**settings) -> dict:
    files = parity.bert_fast(False, **settings)
    return {name: files[name] for name in ("tokenizer_json", "tokenizer_config_json")}


@functools.cache
def modernbert() -> dict:
    """Byte-level BPE with BERT's special tokens at its end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(list(parity.BERT_TOKENS.values()))
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[
        (token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")])
    return {"tokenizer_json": tokenizer.to_str(), "tokenizer_config_json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **parity.BERT_TOKENS}}


# Models

def unpacked(name: str, folder: Path, at: str = "") -> Path:
    """As `unpack`, with ROWS words and 30 more positions."""
    unpack(name, folder, at)
    weights = next(path for path in (folder / at).iterdir() if path.suffix in (".safetensors", ".bin"))
    arrays = {key: np.array(read()) for key, read in read_weights(folder / at).data.items()}
    weights.unlink()
    save_file({key: grown(key, array) for key, array in arrays.items()},
              weights.with_name(weights.name.replace("pytorch_model.bin", "model.safetensors")))
    for path in folder.rglob("*config.json"):
        path.write_text(json.dumps(json.loads(path.read_text(), object_hook=widened)))
    return folder


def grown(name: str, array: np.ndarray) -> np.ndarray:
    rows = len(np.atleast_1d(array))
    if name.endswith(("word_embeddings.weight", "token_embedding.weight", "tok_embeddings.weight")):
        rows = ROWS
    elif "position" in name and "vis" not in name:
        rows += 30
    return np.resize(array, (rows, *array.shape[1:])) if array.ndim else array


def widened(values: dict) -> dict:
    longer = {name: values[name] + 30 for name in ("max_position_embeddings", "context_length") if name in values}
    return values | longer | ({"vocab_size": ROWS} if "vocab_size" in values else {})


class Family(NamedTuple):
    """A recorded model (or ""), a tokenizer's files, its class in transformers, and how many tokens a text has."""

    model: str
    files: Callable[[], dict]
    theirs: str
    limit: int


FAMILIES = {
    "CLIP": Family("clip_whole", clip, "CLIPTokenizer", 36),
    "CLIP, padded with !": Family("", lambda: of_type("clip", clip("!")), "CLIPTokenizer", 36),
    "open_clip, its own tower": Family("open_clip_own_text", clip, "CLIPTokenizer", 36),
    "SigLIP": Family("siglip", siglip, "SiglipTokenizer", 38),
    "SigLIP, with bytes": Family("", lambda: of_type("siglip", siglip(byte_fallback=True, vocab_size=520)),
                                 "SiglipTokenizer", 40),
    "SigLIP, with capitals": Family("siglip", lambda: siglip(lower=False, byte_fallback=True, vocab_size=520),
                                    "SiglipTokenizer", 38),
    "SigLIP 2": Family("siglip", gemma, "Siglip2Tokenizer", 38),
    "SigLIP 2, its json cuts and pads": Family("", lambda: of_type("siglip", gemma(cuts=True)), "Siglip2Tokenizer", 40),
    "Meta CLIP 2": Family("metaclip_2", xlm_r, "XLMRobertaTokenizer", 40),
    "open_clip": Family("open_clip_mean_mlp", xlm_r, "XLMRobertaTokenizer", 40),
    "M-CLIP": Family("m_clip", xlm_r, "XLMRobertaTokenizer", 40),
    "M-CLIP, sentencepiece": Family("", lambda: of_type("M-CLIP", xlm_r_model()), "XLMRobertaTokenizer", 40),
    "DistilBERT": Family("distilbert", lambda: bert(tokenizer_class="DistilBertTokenizer"), "BertTokenizer", 40),
    "ModernBERT": Family("modernbert", modernbert, "PreTrainedTokenizerFast", 54),
    "mmBERT": Family("", lambda: of_type("modernbert", gemma(end="<bos> $A <eos>")), "PreTrainedTokenizerFast", 40),
    "sentence-transformers": Family("st_bert_mean", bert, "BertTokenizer", 40),
}
FIXED = ("SigLIP",)


def of_type(kind: str, files: dict) -> dict:
    return files | {"config_json": {"model_type": kind}}


def write_files(folder: Path, files: dict) -> Path:
    """As `write`; bytes are written under their own names."""
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
    return write(folder, **{name: value for name, value in files.items() if not isinstance(value, bytes)})


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Callable[[str], tuple[HybridCLIP | None, CLIPProcessor, Path]]:
    """Opens a family: its model if there is one, its processor and its folder."""
    root = tmp_path_factory.mktemp("opened")
    vision = unpack("clip_vision_gelu", root / "vision")

    @functools.cache
    def open(name: str):
        family = FAMILIES[name]
        folder = root / str(list(FAMILIES).index(name))
        if not family.model:
            write_files(folder, family.files())
            fixed = name.startswith(FIXED)
            return None, CLIPProcessor.load(folder, image_size=16, max_length=40, fixed_length=fixed), folder
        write_files(unpacked(family.model, folder), family.files())
        if family.model == "open_clip_mean_mlp":
            path = folder / "open_clip_config.json"
            path.write_text(path.read_text().replace('"text"', json.dumps(str(folder / "text"))))
        if family.model == "m_clip":
            path = folder / "config.json"
            path.write_text(path.read_text().replace('"base"', json.dumps(str(folder / "base"))))
        whole = family.model in WHOLE + OPEN_CLIP
        return (*(load_clip(folder) if whole else load_towers(vision, folder)), folder)

    return open


def ids_of(tokenizer, texts: list[str], length: int, fixed: bool) -> dict[str, np.ndarray]:
    return tokenizer(texts, padding="max_length" if fixed else True, truncation=True, max_length=length,
                     return_attention_mask=True, return_tensors="np")


def assert_same(ours: CLIPProcessor, tokenizer, texts: list[str], length: int, fixed: bool = False) -> None:
    wanted, found = ids_of(tokenizer, texts, length, fixed), ours(text=texts)
    for key in ("input_ids", "attention_mask"):
        assert found[key].shape == wanted[key].shape, key
        for text, row, expected in zip(texts, found[key], wanted[key], strict=True):
            np.testing.assert_array_equal(row, expected, err_msg=f"{key} of {text!r}")


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_and_masks(opened, name):
    (_, ours, folder), fixed = opened(name), name.startswith(FIXED)
    assert ours.max_length == FAMILIES[name].limit
    theirs = getattr(transformers, FAMILIES[name].theirs).from_pretrained(folder)
    texts = PLAIN if FAMILIES[name].theirs == "SiglipTokenizer" else [*PLAIN, NAMED]
    assert_same(ours, theirs, texts, ours.max_length, fixed)
    assert 0 < ours.truncated < len(texts)


def test_the_formats_really_differ(opened):
    """Else the ids above would be the same for a reason of no worth."""
    tokens = {name: opened(name)[1].tokenizer.encode("Kupu-KUPU, Élan 한").tokens for name in FAMILIES}
    assert tokens["CLIP"][0] == "<|startoftext|>" and tokens["CLIP"][2].endswith("</w>")
    assert "".join(tokens["SigLIP"]).startswith("▁kupukupu▁") and tokens["SigLIP"][-1] == "</s>"
    assert tokens["SigLIP, with bytes"][-4:] == ["<0xED>", "<0x95>", "<0x9C>", "</s>"] != tokens["SigLIP"][-4:]
    assert {"<0x4B>", "<0xED>"} <= set(tokens["SigLIP, with capitals"]) and "-" not in tokens["SigLIP, with capitals"]
    assert "".join(tokens["SigLIP 2"]).startswith("kupu-kupu") and tokens["SigLIP 2"][-1] == "<eos>"
    assert "".join(tokens["mmBERT"]).startswith("<bos>K") and tokens["mmBERT"][-1] == "<eos>"
    assert "".join(tokens["Meta CLIP 2"][1:]).startswith("▁K") and tokens["Meta CLIP 2"][-1] == "</s>"
    assert any("K" in token for token in tokens["DistilBERT"]) and "ĠÃī" in "".join(tokens["ModernBERT"])


@pytest.mark.parametrize("name", ["SigLIP", "SigLIP 2"])
def test_siglip_has_no_capitals_and_always_the_full_length(opened, name):
    ours = opened(name)[1]
    batch = ours.tokenize(["Kucing DI Atas", "kucing di atas"], length=5, multiple=8)
    np.testing.assert_array_equal(*batch["input_ids"])
    assert batch["input_ids"].shape == (2, 38)
    length, pad = batch["attention_mask"][0].sum(), {"SigLIP": 1, "SigLIP 2": 0}[name]
    np.testing.assert_array_equal(batch["input_ids"][0, length - 1 :], [1] + [pad] * (38 - length))
    assert (batch["input_ids"][0, : length - 1] > 1).all()


@pytest.mark.parametrize("name, format", [
    ("SigLIP", "native"), ("SigLIP", "transformers"), ("SigLIP, with capitals", "native"),
    ("SigLIP, with capitals", "transformers"), ("SigLIP 2", "transformers"), ("CLIP", "transformers")])
def test_a_saved_model_has_the_same_ids(opened, tmp_path, name, format):
    model, ours, _ = opened(name)
    save_clip(model, ours, tmp_path, format)
    wanted, (_, again) = ours(text=PLAIN), load_clip(tmp_path)
    for key, values in again(text=PLAIN).items():
        np.testing.assert_array_equal(values, wanted[key], err_msg=key)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(ours, theirs, PLAIN, ours.max_length, name.startswith(FIXED))


@pytest.mark.parametrize("config", [{"model_type": "siglip_text_model"}, None])
@pytest.mark.parametrize("name", ["SigLIP", "SigLIP 2"])
def test_siglips_tokenizer_in_a_folder_of_its_own(opened, tmp_path, name, config):
    _, wanted, folder = opened(name)
    write_files(tmp_path, FAMILIES[name].files() | ({} if config is None else {"config_json": config}))
    _, ours = load_clip(folder, tokenizer=tmp_path)
    np.testing.assert_array_equal(ours(text=PLAIN)["input_ids"], wanted(text=PLAIN)["input_ids"])


def test_siglip_2_has_no_capitals_even_if_its_file_keeps_them(opened, tmp_path):
    """transformers' GemmaTokenizer, which older files of SigLIP 2 name, ignores do_lower_case and keeps capitals."""
    files = gemma()
    settings = files["tokenizer_config_json"] | {"do_lower_case": False}
    _, wanted, folder = opened("SigLIP 2")
    write_files(tmp_path, files | {"tokenizer_config_json": settings})
    _, ours = load_clip(folder, tokenizer=tmp_path)
    np.testing.assert_array_equal(ours(text=PLAIN)["input_ids"], wanted(text=PLAIN)["input_ids"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GemmaTokenizer" and theirs.tokenize("DI") != theirs.tokenize("di")


@pytest.mark.parametrize("text", ["kucing\u200b", "kucing \ufeff", "kucing\n\u200e"])
def test_letters_of_no_width_at_the_end_of_siglips_texts(opened, text):
    _, ours, folder = opened("SigLIP")
    assert_same(ours, transformers.SiglipTokenizer.from_pretrained(folder), [text], ours.max_length, fixed=True)


# Texts of sentence-transformers

E5 = {"config_sentence_transformers_json": {"prompts": {"query": "query: ", "passage": "passage: "},
                                            "default_prompt_name": "query"}}
SENTENCES = {  # files, the option `prefix`, and how the text and its length should be
    "length": ({"sentence_bert_config_json": {"max_seq_length": 12, "do_lower_case": False}}, None, str, 12),
    "length, longer than the tower's": ({"sentence_bert_config_json": {"max_seq_length": 512}}, None, str, 40),
    "lower case": ({"sentence_bert_config_json": {"max_seq_length": 20, "do_lower_case": True}}, None, str.lower, 20),
    "default prompt": (E5, None, "query: {}".format, 40),
    "another prompt": (E5, "passage: ", "passage: {}".format, 40),
    "no prompt": (E5, "", str, 40),
    "prompts without a default": ({"config_sentence_transformers_json": {
        "prompts": {"query": "query: "}, "default_prompt_name": None}}, None, str, 40),
    "both": (E5 | {"sentence_bert_config_json": {"do_lower_case": True}}, "Kueri: ",
             lambda text: f"kueri: {text.lower()}", 40),
}


@pytest.mark.parametrize("name, at", [*((name, "") for name in SENTENCES), ("both", "0_Transformer")])
def test_sentence_transformers(tmp_path, name, at):
    files, prefix, prepared, limit = SENTENCES[name]
    vision = unpack("clip_vision_gelu", tmp_path / "vision")
    folder = unpacked("st_bert_mean", tmp_path / "text", at)
    inside = folder / at
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = at
    write(folder, modules_json=modules, **{key: value for key, value in files.items() if "prompts" in value})
    write(inside, **bert(), **{key: value for key, value in files.items() if "prompts" not in value})
    _, ours = load_towers(vision, folder, prefix=prefix)
    assert ours.max_length == limit
    theirs = transformers.BertTokenizer.from_pretrained(inside)
    wanted = ids_of(theirs, list(map(prepared, PLAIN)), limit, False)
    for key, values in ours(text=PLAIN).items():
        np.testing.assert_array_equal(values, wanted[key], err_msg=key)


E5_LIKE = {"XLM-RoBERTa": (xlm_r, "XLMRobertaTokenizer"), "of sentencepiece": (xlm_r_model, "XLMRobertaTokenizer"),
           "WordPiece": (bert, "BertTokenizer"), "byte-level BPE": (modernbert, "PreTrainedTokenizerFast"),
           "Gemma": (gemma, "PreTrainedTokenizerFast")}


@pytest.mark.parametrize("name", E5_LIKE)
def test_a_prefix_is_before_each_text(tmp_path, name):
    files, kind = E5_LIKE[name]
    settings = {"config_json": {"model_type": "bert"}, "preprocessor_config_json": CONFIGS["SigLIP"]}
    write_files(tmp_path, files() | settings)
    ours = CLIPProcessor.load(tmp_path, max_length=40, rules=TextRules(prefix="query: "))
    ours.save(tmp_path / "again")
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    token = ours.special_tokens["mask_token"]
    texts = [*PLAIN, NAMED, token, f"kucing {token} anjing", f"{token}kucing", f"kucing {token} " * 30]
    wanted = ids_of(theirs, [f"query: {text}" for text in texts], 40, False)
    for processor in (ours, CLIPProcessor.load(tmp_path / "again")):
        found = processor(text=texts)
        for text, row, expected in zip(texts, found["input_ids"], wanted["input_ids"], strict=True):
            np.testing.assert_array_equal(row, expected, err_msg=repr(text))


def test_a_prefix_leaves_added_tokens_of_normalised_texts_as_they_are(tmp_path):
    """Two spaces are one token of ModernBERT: with the prefix in its normaliser the tokenizer would not find it."""
    files = modernbert()
    tokenizer = Tokenizer.from_str(files["tokenizer_json"])
    tokenizer.add_tokens([AddedToken("  ", normalized=True)])
    files |= {"tokenizer_json": tokenizer.to_str(), "config_json": {"model_type": "bert"}}
    write_files(tmp_path, files | {"preprocessor_config_json": CONFIGS["SigLIP"]})
    ours = CLIPProcessor.load(tmp_path, max_length=40, rules=TextRules(prefix="query: "))
    wanted = tokenizer.encode("query: kucing  tidur")
    assert "  " in wanted.tokens
    np.testing.assert_array_equal(ours(text="kucing  tidur")["input_ids"], [wanted.ids])


# Pictures

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
SQUARE = {"height": 20, "width": 20}
CONFIGS = {  # as these families' files are, at another size
    "SigLIP": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "resample": 3, "do_resize": True,
               "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **HALF},
    "SigLIP 2": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "resample": 2, "do_convert_rgb": None,
                 "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, **HALF},
    "SigLIP 2, saved fast": {"image_processor_type": "SiglipImageProcessorFast", "size": SQUARE, "crop_size": None,
                             "do_center_crop": None, "default_to_square": True, "resample": 2, "device": None, **HALF},
    "SigLIP, defaults": {"image_processor_type": "SiglipImageProcessor", "size": SQUARE},
    "DINOv2": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 23}, "crop_size": SQUARE,
               "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
               "do_resize": True, "rescale_factor": 1 / 255, "resample": 3, **IMAGENET},
    "DINOv2, defaults": {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 23},
                         "crop_size": SQUARE},
    "Meta CLIP 2": {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 20},
                    "crop_size": SQUARE, "do_center_crop": True, "resample": 3, "default_to_square": False,
                    **parity.CLIP_STATS},
}
CLASSES = {"S": SiglipImageProcessorPil, "D": BitImageProcessorPil, "M": CLIPImageProcessorPil}
PICTURES = [photo(), noise(37, 90), noise(20, 20), noise(9, 5), noise(64, 21), photo().convert("L"),
            photo().convert("RGBA")]


def assert_same_pixels(ours: CLIPProcessor, theirs) -> None:
    for image in PICTURES:
        wanted = pixels_of(theirs, image.convert("RGB"))  # where do_convert_rgb is null they take no other
        np.testing.assert_allclose(ours(images=image)["pixel_values"][0], wanted, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels(tmp_path, name):
    write(tmp_path, preprocessor_config_json=CONFIGS[name])
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs) is CLASSES[name[0]]
    ours = CLIPProcessor.load(tmp_path, needs_tokenizer=False)
    assert ours.image_size == 20
    assert_same_pixels(ours, theirs)
    ours.save(tmp_path)
    assert_same_pixels(CLIPProcessor.load(tmp_path, needs_tokenizer=False), theirs)


def test_pixels_of_a_loaded_siglip_and_dinov2(tmp_path):
    folder = unpack("siglip", tmp_path / "siglip")
    write(folder, preprocessor_config_json=CONFIGS["SigLIP"] | {"size": {"height": 18, "width": 18}})
    assert_same_pixels(load_clip(folder)[1], SiglipImageProcessorPil(size={"height": 18, "width": 18}))
    words, folder = unpacked("distilbert", tmp_path / "words"), unpack("dinov2", tmp_path / "dinov2")
    write(words, **bert())
    settings = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}} | IMAGENET
    write(folder, preprocessor_config_json=CONFIGS["DINOv2"] | settings)
    model, ours = load_towers(folder, words)
    assert ours.image_size == model.config.vision.image_size == 16
    assert_same_pixels(ours, BitImageProcessorPil(**settings))


SIDE = {"height": 16, "width": 16}
PREPROCESS = {  # open_clip's preprocess_cfg, and the processor of transformers that does the same
    "nothing stated": ({}, lambda: CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)),
    "shortest": ({"size": 16, "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
                  "mean": HALF["image_mean"], "std": IMAGENET["image_std"]},
                 lambda: CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, image_mean=HALF["image_mean"],
                                               image_std=IMAGENET["image_std"])),
    "shortest, bilinear": ({"size": [16, 16], "interpolation": "bilinear"},
                           lambda: CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, resample=2)),
    "squash": ({"size": [16, 16], "interpolation": "bicubic", "resize_mode": "squash", "mean": [0.5] * 3,
                "std": [0.5] * 3}, lambda: SiglipImageProcessorPil(size=SIDE)),
    "squash, bilinear": ({"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
                         lambda: SiglipImageProcessorPil(size=SIDE, resample=2)),
}


@pytest.mark.parametrize("name", PREPROCESS)
def test_pixels_of_open_clip(tmp_path, name):
    settings, theirs = PREPROCESS[name]
    write(tmp_path, open_clip_config_json={"preprocess_cfg": settings})
    assert_same_pixels(CLIPProcessor.load(tmp_path, image_size=16, needs_tokenizer=False), theirs())


def test_pixels_of_a_loaded_open_clip(tmp_path):
    folder = unpack("open_clip_own_text", tmp_path)
    settings, theirs = PREPROCESS["squash, bilinear"]
    values = json.loads((folder / "open_clip_config.json").read_text())
    write(folder, open_clip_config_json=values | {"preprocess_cfg": settings})
    assert_same_pixels(load_clip(folder)[1], theirs())


def test_a_resize_mode_that_is_not_known(tmp_path):
    settings = {"preprocess_cfg": {"size": 16, "resize_mode": "longest"}}
    write(tmp_path, open_clip_config_json=settings)
    with pytest.raises(ValueError, match="resize_mode is 'longest', not one of shortest, squash"):
        CLIPProcessor.load(tmp_path, image_size=16, needs_tokenizer=False)

"""The processor beside transformers: the same pixels as its CLIPImageProcessor and the same ids as its AutoTokenizer.

And where it differs on purpose, what it does instead. Checkpoint folders are made small, with the files real ones have.
"""

import io
import json
import warnings
from pathlib import Path

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from matplotlib import cbook
from PIL import Image
from tiny import tiny_processor
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clipid_utils.model.clip import HybridCLIP
from clipid_utils.model.embed import embed_texts
from clipid_utils.model.processor import IMAGE_MEAN, IMAGE_STD, CLIPProcessor
from clipid_utils.pictures import decode_square, to_rgb

SIZE = 24
LEVEL = 1 / 255 / min(IMAGE_STD)  # one step of an 8-bit picture, in pixel values


def write(folder: Path, **files) -> Path:
    """A folder of files; `name_json=` is name.json, `name_txt=` is name.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


# Pictures

@pytest.fixture(scope="module")
def processor():
    processor = tiny_processor()
    return CLIPProcessor(processor.tokenizer, SIZE, processor.max_length)


@pytest.fixture(scope="module")
def theirs():
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)


def pixels_of(image_processor, image: Image.Image) -> np.ndarray:
    return np.asarray(image_processor(images=[image], return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)


def photo(width: int = 101, height: int = 67) -> Image.Image:
    with Image.open(cbook.get_sample_data("grace_hopper.jpg")) as image:
        return image.resize((width, height))


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def stored(image: Image.Image, format: str, **options) -> Image.Image:
    """The picture as it comes from a file of that format."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return Image.open(file)


def seen_through() -> Image.Image:
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


SAME = {
    "JPEG": lambda: stored(photo(), "JPEG"),
    "a large JPEG": lambda: stored(photo(1200, 901), "JPEG"),
    "grey JPEG": lambda: stored(photo().convert("L"), "JPEG"),
    "CMYK JPEG": lambda: stored(photo().convert("CMYK"), "JPEG"),
    "YCbCr": lambda: photo().convert("YCbCr"),
    "RGBA PNG": lambda: stored(seen_through(), "PNG"),
    "LA PNG": lambda: stored(seen_through().convert("LA"), "PNG"),
    "WebP": lambda: stored(seen_through(), "WEBP", lossless=True),
    "palette PNG": lambda: stored(photo().convert("P"), "PNG"),
    "palette PNG, one colour transparent": lambda: stored(photo().quantize(16), "PNG", transparency=3),
    "palette PNG, colours half transparent": lambda: stored(seen_through().quantize(16), "PNG"),
    "RGB PNG, one colour transparent": lambda: stored(photo(), "PNG", transparency=photo().getpixel((3, 3))),
    "GIF": lambda: stored(photo().quantize(16), "GIF", transparency=3),
    "1 bit": lambda: stored(photo().convert("1"), "PNG"),
    "one pixel": lambda: photo(1, 1),
    "1 high": lambda: noise(301, 1),
    "1 wide": lambda: noise(1, 64),
    "2 high": lambda: noise(75, 2),
    "long": lambda: noise(940, 10),
    "tall": lambda: noise(7, 611),
    "smaller than the crop": lambda: noise(11, 7),
    "the size of the crop": lambda: noise(SIZE, SIZE),
    "one more": lambda: noise(SIZE + 1, SIZE),
    "a logo": lambda: Image.open(cbook.get_sample_data("logo2.png")),
}


@pytest.mark.parametrize("name", SAME)
def test_the_pixels_of_clip_image_processor(processor, theirs, name):
    image = SAME[name]()
    ours = processor(images=[image])["pixel_values"][0]
    np.testing.assert_allclose(ours, pixels_of(theirs, image), atol=1e-5)


@settings(max_examples=100)
@given(width=st.integers(1, 120), height=st.integers(1, 120), size=st.sampled_from([16, 24, 27]))
def test_the_same_bytes_at_any_size(width, height, size):
    image = noise(width, height)
    short = min(width, height)
    whole = image.resize((int(width * size / short), int(height * size / short)), Image.Resampling.BICUBIC)
    left, top = (whole.width - size) // 2, (whole.height - size) // 2
    np.testing.assert_array_equal(decode_square(image, size), whole.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [(1999, 2), (701, 7), (3000, 1), (1, 3000), (31, 1999)])
def test_where_only_the_square_is_built_it_is_the_same_within_one_level(monkeypatch, processor, theirs, size):
    monkeypatch.setattr("clipid_utils.pictures.MAX_PIXELS", 0)
    image = noise(*size)
    ours = processor(images=[image])["pixel_values"][0]
    np.testing.assert_allclose(ours, pixels_of(theirs, image), atol=1.01 * LEVEL)


def test_a_picture_too_long_for_them_costs_no_memory():
    assert decode_square(noise(60000, 1), 224).shape == (224, 224, 3)  # built whole it is 12 GB


# Pictures that differ on purpose

@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_camera_is_turned_back(processor, theirs, orientation):
    turns = [None, None, 0, 3, 1, 5, 2, 6, 4]  # how the scene came to lie in the file
    scene = Image.merge("RGB", [Image.linear_gradient("L"), *Image.radial_gradient("L").convert("RGB").split()[:2]])
    scene = scene.resize((96, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = scene if turns[orientation] is None else scene.transpose(Image.Transpose(turns[orientation]))
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = stored(lying, format, exif=exif, **({"quality": 98} if format != "PNG" else {}))
        upright = to_rgb(file)
        assert upright.size == scene.size, format
        assert np.abs(np.asarray(upright, int) - np.asarray(scene, int)).mean() < 6, format
        assert to_rgb(upright).size == scene.size, f"{format}: turned twice"
    np.testing.assert_allclose(processor(images=[upright])["pixel_values"][0], pixels_of(theirs, upright), atol=1e-5)


def test_a_broken_exif_block_loses_no_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "kamera"
    block, rng = exif.tobytes(), np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(block)
        for place in rng.integers(6, len(block), 4):
            broken[place] = rng.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sorted(to_rgb(stored(photo(6, 4), "JPEG", exif=bytes(broken))).size) == [4, 6]


def grey(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def test_16_bit_greys_keep_their_shades():
    rng = np.random.default_rng(0)
    shades = rng.integers(0, 256, (31, 47))
    for image in (
        stored(Image.fromarray((shades * 257).astype(np.uint16)), "PNG"),
        stored(Image.fromarray((shades * 257).astype(">u2")), "TIFF"),
        stored(Image.fromarray((shades * 257).astype(np.int32)), "TIFF"),
        Image.fromarray(shades.astype(np.int32)),  # 8-bit values in a 32-bit picture
        Image.fromarray((shades * (2**31 // 256)).astype(np.int32)),
    ):
        assert image.mode.startswith("I")
        darkest = 1 if shades.max() * 257 == 65535 else 0
        assert np.abs(np.asarray(to_rgb(image), int) - np.asarray(grey(shades), int)).max() <= darkest, image.mode
    dark = Image.fromarray(np.array([[0, 300, 70000]], np.int32) - 100)
    assert [to_rgb(dark).getpixel((x, 0))[0] for x in range(3)] == [0, 1, 255]


def test_a_16_bit_grey_that_is_transparent_is_white():
    image = Image.fromarray(np.array([[0, 1000, 40000]], np.uint16))
    image = stored(image, "PNG", transparency=1000)
    assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 255, 156]


# Preprocessor configs

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP_STATS = {"image_mean": list(IMAGE_MEAN), "image_std": list(IMAGE_STD)}
CONFIGS = {  # as the files of these checkpoints are, at another size
    "CLIP": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20}, "do_resize": True,
             "do_center_crop": True, "crop_size": {"height": 20, "width": 20}, "resample": 3, "do_rescale": True,
             "rescale_factor": 0.00392156862745098, "do_normalize": True, **CLIP_STATS},
    "CLIP of 2021": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 20, "crop_size": 20, "resample": 3,
                     "do_resize": True, "do_center_crop": True, "do_normalize": True, **CLIP_STATS},
    "CLIP, crop smaller": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 27},
                           "crop_size": 20, "do_center_crop": True, **CLIP_STATS},
    "CLIP, crop larger": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 15},
                          "crop_size": 20, "do_center_crop": True, **CLIP_STATS},
    "CLIP, no statistics": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 20},
                            "crop_size": {"height": 20, "width": 20}},
    "ViT": {"image_processor_type": "ViTImageProcessor", "size": {"height": 20, "width": 20}, "do_resize": True,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 2, **HALF},
    "ViT of 2021": {"feature_extractor_type": "ViTFeatureExtractor", "size": 20, "resample": 2, "do_resize": True,
                    "do_normalize": True, **HALF},
    "ViT, saved fast": {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 20, "width": 20},
                        "crop_size": None, "do_center_crop": None, "resample": 2, "default_to_square": True, **HALF},
    "ViT, bicubic": {"image_processor_type": "ViTImageProcessor", "size": {"height": 20, "width": 20}, "resample": 3},
    "DeiT": {"image_processor_type": "DeiTImageProcessor", "size": {"height": 27, "width": 27}, "resample": 3,
             "crop_size": {"height": 20, "width": 20}, "do_center_crop": True, **HALF},
    "another scale": {"image_processor_type": "ViTImageProcessor", "size": {"height": 20, "width": 20},
                      "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "no scale": {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 20, "do_rescale": False,
                 "image_mean": [127.0, 128.0, 129.0], "image_std": [60.0] * 3},
    "not normalised": {"image_processor_type": "CLIPImageProcessor", "size": 20, "crop_size": 20,
                       "do_normalize": False},
}


def text_files() -> dict:
    tokenizer = tiny_processor().tokenizer
    return {"tokenizer_json": tokenizer.to_str(), "tokenizer_config_json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16, "pad_token": "[PAD]"}}


@pytest.mark.parametrize("name", CONFIGS)
def test_preprocessor_configs_are_followed(tmp_path, name):
    write(tmp_path, preprocessor_config_json=CONFIGS[name], **text_files())
    ours = CLIPProcessor.load(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    ours.save(tmp_path / "again")
    again = CLIPProcessor.load(tmp_path / "again")
    saved = AutoImageProcessor.from_pretrained(tmp_path / "again", backend="pil")
    assert ours.image_size == 20
    for image in (photo(), noise(37, 90), noise(20, 20), noise(9, 5)):
        pixels = ours(images=[image])["pixel_values"]
        np.testing.assert_allclose(pixels[0], pixels_of(theirs, image), atol=1e-4 if name == "no scale" else 1e-5)
        np.testing.assert_array_equal(again(images=[image])["pixel_values"], pixels)
        np.testing.assert_allclose(pixels_of(saved, image), pixels[0], atol=1e-4)


def test_a_file_of_before_the_types_had_names(tmp_path):
    vit = write(tmp_path / "vit", preprocessor_config_json={"size": 20, "resample": 2, **HALF}, **text_files())
    clip = write(tmp_path / "clip", preprocessor_config_json={"size": 20, "crop_size": 20, "resample": 3, **CLIP_STATS},
                 **text_files())
    image = noise(60, 30)
    stretched = image.resize((20, 20), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(CLIPProcessor.load(vit)(images=image)["pixel_values"][0],
                               np.asarray(stretched) / 127.5 - 1, atol=1e-5)
    np.testing.assert_array_equal(CLIPProcessor.load(clip)(images=image)["pixel_values"],
                                  CLIPProcessor(tiny_processor().tokenizer, 20, 16)(images=image)["pixel_values"])


def test_without_a_preprocessor_config_it_is_clips_at_the_models_size(tmp_path):
    ours = CLIPProcessor.load(write(tmp_path, **text_files()), image_size=32)
    assert (ours.image_size, ours.resize, ours.resample) == (32, 32, Image.Resampling.BICUBIC)
    assert (ours.image_mean, ours.image_std) == (IMAGE_MEAN, IMAGE_STD)


def test_the_newest_files_keep_it_in_processor_config(tmp_path):
    write(tmp_path, processor_config_json={"processor_class": "x", "image_processor": CONFIGS["ViT"]}, **text_files())
    ours = CLIPProcessor.load(tmp_path)
    assert (ours.image_size, ours.resize, ours.image_mean) == (20, (20, 20), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("config", [
    {"size": {"shortest_edge": 20}, "do_center_crop": False},
    {"size": {"shortest_edge": 20}, "crop_size": 20, "do_center_crop": None},
    {"size": {"height": 20, "width": 30}, "do_center_crop": False},
    {"size": {"longest_edge": 20}, "crop_size": 20, "do_center_crop": True},
    {"size": 20, "crop_size": {"height": 20, "width": 10}, "do_center_crop": True},
    {"size": 20, "crop_size": 20, "do_resize": False},
])
def test_pictures_that_would_not_be_square_are_an_error(tmp_path, config):
    write(tmp_path, preprocessor_config_json={"image_processor_type": "CLIPImageProcessor", **config}, **text_files())
    with pytest.raises(ValueError, match=r"preprocessor_config\.json: size .* make no squares"):
        CLIPProcessor.load(tmp_path)


def test_a_broken_json_file_is_named(tmp_path):
    write(tmp_path, preprocessor_config_json="{", **text_files())
    with pytest.raises(ValueError, match=r"preprocessor_config\.json:1: not valid JSON"):
        CLIPProcessor.load(tmp_path)


# Texts

TEXTS = [
    "Seekor kucing sedang tidur di atas kursi merah.", "kupu-kupu", "Anak-anak bermain layang-layang di sawah",
    "rumah-RUMAH  di   tepi sungai", " spasi di depan dan di belakang ", "baris\nbaru\tdan tab", "café naïve Élan Ürün",
    "cafe\u0301 dengan tanda terpisah", "🐱 kucing lucu 👍🏽🇮🇩 👩‍👩‍👧", "SEORANG Anak BerLari",
    "mobil2 & sepeda2 (3/4) 100%!", "harga Rp1.500.000,00", "字 kanji é", "se\u200bkor\u00a0kucing",
    "[MASK] <mask> [SEP] </s>", "ﬁlm ½ Ａ",
    "a", "ke-2 kalinya; di-upload—“kutip” ‘satu’…", "sungai " * 80, "kucing " * 15 + "dan anjing",
]
CORPUS = TEXTS[:6] * 4 + TEXTS


def bert(lowercase: bool, **options) -> BertWordPieceTokenizer:
    tokenizer = BertWordPieceTokenizer(lowercase=lowercase, **options)
    tokenizer.train_from_iterator(CORPUS, vocab_size=220, min_frequency=1, show_progress=False)
    return tokenizer


def vocab_txt(tokenizer) -> str:
    return "".join(f"{token}\n" for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))


BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
BERT_CONFIG = {"model_type": "bert", "max_position_embeddings": 40, "vocab_size": 220}
ROBERTA_SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
ROBERTA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>",
                  "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
ROBERTA_CONFIG = {"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1, "vocab_size": 400}


def bert_fast(lowercase: bool, **settings) -> dict:
    return {"tokenizer_json": bert(lowercase)._tokenizer.to_str(), "config_json": BERT_CONFIG,
            "tokenizer_config_json": {"tokenizer_class": "BertTokenizer", "do_lower_case": lowercase, **BERT_TOKENS,
                                      **settings}, "special_tokens_map_json": BERT_TOKENS}


def bert_vocab(lowercase: bool, settings: dict | None) -> dict:
    files = {"vocab_txt": vocab_txt(bert(lowercase, strip_accents=False)), "config_json": BERT_CONFIG}
    return files if settings is None else {**files, "tokenizer_config_json": settings}


def roberta_bpe() -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(CORPUS, vocab_size=400, min_frequency=1, special_tokens=ROBERTA_SPECIALS,
                                  show_progress=False)
    return tokenizer


def roberta_fast(**settings) -> dict:
    tokenizer = roberta_bpe()._tokenizer
    tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
    return {"tokenizer_json": tokenizer.to_str(), "config_json": ROBERTA_CONFIG,
            "tokenizer_config_json": {"tokenizer_class": "RobertaTokenizer", **settings},
            "special_tokens_map_json": {
                **ROBERTA_TOKENS, "mask_token": {"content": "<mask>", "lstrip": True, "normalized": False,
                                                 "rstrip": False, "single_word": False}}}


def roberta_vocab(**settings) -> dict:
    model = json.loads(roberta_bpe()._tokenizer.to_str())["model"]
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    return {"vocab_json": model["vocab"], "merges_txt": "#version: 0.2\n" + merges, "config_json": ROBERTA_CONFIG,
            **({"tokenizer_config_json": settings} if settings else {})}


def xlm_roberta() -> dict:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False))
    tokenizer.add_special_tokens(["<mask>"])
    tokenizer.post_processor = TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 0), ("</s>", 2)])
    return {"tokenizer_json": tokenizer.to_str(), "tokenizer_config_json": {
                "tokenizer_class": "XLMRobertaTokenizer", "model_max_length": 30, **ROBERTA_TOKENS},
            "config_json": {**ROBERTA_CONFIG, "model_type": "xlm-roberta", "max_position_embeddings": 36}}


LONGEST = 10**30
FAMILIES = {  # files, and how many tokens a text may have: in the file, or in the tower of this family
    "BERT, lower case": (lambda: bert_fast(True, model_max_length=38), 38),
    "BERT, cased": (lambda: bert_fast(False, model_max_length=LONGEST), 40),
    "BERT, cased, accents stripped": (lambda: bert_fast(False, strip_accents=True, model_max_length=512), 40),
    "BERT, padded left": (lambda: bert_fast(True, padding_side="left", truncation_side="left"), 40),
    "BERT, another padding": (lambda: bert_fast(True, pad_token="[UNK]"), 40),
    "BERT, its json cuts and pads": (lambda: bert_cutting(), 40),
    "BERT of vocab.txt alone": (lambda: bert_vocab(True, None), 40),
    "BERT of vocab.txt, cased": (lambda: bert_vocab(False, {"do_lower_case": False, "model_max_length": 1e30}), 40),
    "BERT of vocab.txt, accents kept": (lambda: bert_vocab(True, {"strip_accents": False, "model_max_length": 20}), 20),
    "RoBERTa": (lambda: roberta_fast(model_max_length=32), 32),
    "RoBERTa, length not stated": (lambda: roberta_fast(), 32),
    "RoBERTa, space before the first word": (lambda: roberta_fast(add_prefix_space=True), 32),
    "RoBERTa of vocab.json": (lambda: roberta_vocab(), 32),
    "RoBERTa of vocab.json, configured": (lambda: roberta_vocab(model_max_length=24, add_prefix_space=True), 24),
    "XLM-RoBERTa": (lambda: xlm_roberta(), 30),
    "a dual encoder without a class": (lambda: {**bert_vocab(False, {"do_lower_case": False}), "config_json": {
        "model_type": "vision-text-dual-encoder", "vision_config": {"model_type": "vit"}, "text_config": BERT_CONFIG,
    }}, 40),
    "the ancestor": (lambda: {**bert_vocab(False, {"do_lower_case": False}), "config_json": {
        "model_type": "hybrid-clip", "vision_config": {"model_type": "clip"}, "text_config": BERT_CONFIG}}, 40),
}


def bert_cutting() -> dict:
    files = bert_fast(True)
    tokenizer = Tokenizer.from_str(files["tokenizer_json"])
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12)
    return {**files, "tokenizer_json": tokenizer.to_str()}


def opened_by_transformers(folder: Path):
    kind = {"tokenizer_type": "bert"} if "text_config" in (folder / "config.json").read_text() else {}
    return AutoTokenizer.from_pretrained(folder, **kind)


def ids_of(tokenizer, texts: list[str], length: int) -> dict:
    return tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="np")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    pictures = {"preprocessor_config_json": CONFIGS["CLIP"]}
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / str(row), **FAMILIES[name][0](), **pictures) for row, name in enumerate(FAMILIES)}


@pytest.mark.filterwarnings("ignore:.*texts are cut")
@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_of_auto_tokenizer(families, tmp_path, name):
    most, length = {"X": 34, "R": 32}.get(name[0], 40), FAMILIES[name][1]
    ours, theirs = CLIPProcessor.load(families[name], max_length=most), opened_by_transformers(families[name])
    assert ours.max_length == length
    lengths = np.array([len(ids) for ids in theirs(TEXTS)["input_ids"]])
    ours.save(tmp_path)
    for processor in (ours, CLIPProcessor.load(tmp_path)):
        batch, wanted = processor(text=TEXTS), ids_of(theirs, TEXTS, length)
        for key in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(batch[key], wanted[key], err_msg=key)
        assert batch["input_ids"].dtype == np.int32 and processor.truncated == (lengths > length).sum() > 0
        rounded, own = processor.tokenize(TEXTS[:3], multiple=8), np.minimum(lengths[:3], length)
        assert rounded["input_ids"].shape[1] == min(length, -(-own.max() // 8) * 8)
        np.testing.assert_array_equal(rounded["attention_mask"].sum(axis=1), own)
    again = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(again["input_ids"], wanted["input_ids"])


def test_the_tokenizers_really_differ(families):
    """Else the ids above would be the same for a reason of no worth."""
    texts = {name: CLIPProcessor.load(families[name]).tokenizer.encode("Kupu-kupu Élan").tokens for name in FAMILIES}
    assert texts["BERT, lower case"][1:4] == ["kupu", "-", "kupu"]
    assert texts["BERT, cased"][1].startswith("K") and any("É" in token for token in texts["BERT, cased"])
    assert not any("É" in token for token in texts["BERT, cased, accents stripped"])
    assert any("é" in token for token in texts["BERT of vocab.txt, accents kept"])
    assert texts["RoBERTa"][0] == "<s>" and not texts["RoBERTa"][1].startswith("Ġ")
    assert texts["RoBERTa, space before the first word"][1].startswith("Ġ")
    assert texts["XLM-RoBERTa"][1].startswith("▁")


def test_a_text_is_not_cut_by_what_another_user_of_the_tokenizer_sets(families):
    theirs = AutoTokenizer.from_pretrained(families["RoBERTa"])
    ours = CLIPProcessor(theirs, 24, 32)
    before = ours(text=TEXTS[:3])
    theirs(TEXTS, padding="max_length", truncation=True, max_length=5)
    np.testing.assert_array_equal(ours(text=TEXTS[:3])["input_ids"], before["input_ids"])
    assert (ours.pad_token, ours.pad_id) == ("<pad>", 1)


class PaddingCounter(HybridCLIP):
    """Embeds a text as its number of RoBERTa paddings, of places that the mask hides, and of all places."""

    def __init__(self):
        pass

    def encode_text(self, input_ids, attention_mask):
        width = jnp.full(len(input_ids), input_ids.shape[1])
        return jnp.stack([(input_ids == 1).sum(1), (attention_mask == 0).sum(1), width], axis=1).astype(jnp.float32)


def test_texts_are_embedded_with_their_own_padding(families):
    padding, hidden, width = embed_texts(PaddingCounter(), CLIPProcessor.load(families["RoBERTa"]), TEXTS[:3]).T
    assert padding.any() and not (width % 8).any()
    np.testing.assert_array_equal(padding, hidden)


def test_a_plain_tokenizer_needs_the_name_of_its_padding(families):
    plain = Tokenizer.from_file(str(families["RoBERTa"] / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"no padding token '\[PAD\]'.*special_tokens="):
        CLIPProcessor(plain, 24, 32)
    ours = CLIPProcessor(plain, 24, 32, special_tokens=ROBERTA_TOKENS)
    np.testing.assert_array_equal(ours(text=TEXTS[:4])["input_ids"],
                                  ids_of(opened_by_transformers(families["RoBERTa"]), TEXTS[:4], 32)["input_ids"])


def test_a_length_with_no_room_is_an_error(families):
    with pytest.warns(UserWarning, match="cut to 2 tokens"), pytest.raises(ValueError, match="give 3 or more"):
        CLIPProcessor.load(families["RoBERTa"]).tokenize(["kucing tidur"], length=2)


def test_a_broken_tokenizer_is_named(tmp_path):
    write(tmp_path, tokenizer_json="{}", config_json=BERT_CONFIG)
    with pytest.raises(ValueError, match="its tokenizer cannot be read"):
        CLIPProcessor.load(tmp_path, image_size=16)


def test_pictures_and_texts_from_two_folders(families, tmp_path):
    pictures = write(tmp_path, preprocessor_config_json=CONFIGS["ViT"])
    ours = CLIPProcessor.load(pictures, families["RoBERTa"])
    batch = ours(images=photo(), text="kucing")
    assert batch["pixel_values"].shape == (1, 20, 20, 3) and batch["input_ids"][0, 0] == 0
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        CLIPProcessor.load(pictures)

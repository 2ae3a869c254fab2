"""Pictures and texts to arrays, the tokenizer learned from captions, and the folder that `transformers` opens too."""

import json
import pickle
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from tiny import NAMES, SIZE, tiny_processor

from clipid_utils.model.processor import IMAGE_MEAN, IMAGE_STD, SPECIAL_TOKENS, CLIPProcessor, train_wordpiece
from clipid_utils.pictures import decode_square, to_rgb


@pytest.fixture
def processor():
    return tiny_processor()


@pytest.fixture(scope="module")
def patient():
    """One for many calls, with room for every text."""
    processor = tiny_processor()
    processor.max_length = 64
    return processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("processor")
    tiny_processor().save(path)
    return path


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


# Pictures

@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(["RGB", "L", "P", "RGBA", "1", "CMYK", "LA", "I;16"]))
def test_any_picture_becomes_the_same_shape(width, height, mode):
    image = Image.new("I;16", (width, height)) if mode == "I;16" else noise(width, height, mode)
    pixels = decode_square(image, SIZE)
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8


@settings(max_examples=20)
@given(st.sampled_from(["red", "white", "#123456"]), st.integers(1, 60), st.integers(1, 60))
def test_one_colour_stays_one_colour(colour, width, height):
    pixels = decode_square(Image.new("RGB", (width, height), colour), SIZE)
    assert (pixels == np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]).all()


def test_the_middle_square_is_kept():
    wide = Image.new("RGB", (4 * SIZE, SIZE), "red")
    wide.paste("blue", (SIZE + SIZE // 2, 0, 2 * SIZE + SIZE // 2, SIZE))
    assert (decode_square(wide, SIZE) == [0, 0, 255]).all()
    assert (decode_square(wide.rotate(90, expand=True), SIZE) == [0, 0, 255]).all()


def test_a_picture_of_the_right_size_is_left_alone():
    image = noise(SIZE, SIZE)
    np.testing.assert_array_equal(decode_square(image, SIZE), np.asarray(image))


def test_transparent_is_white():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 128))
    assert to_rgb(half).getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = to_rgb(half).getpixel((1, 0))
    assert red == 255 and green == blue and abs(green - 127) <= 1
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_normalised_by_clips_mean_and_deviation(processor):
    images = [Image.new("RGB", (SIZE, SIZE), "white"), Image.new("RGB", (9, 30), "black")]
    pixels = processor(images=images)["pixel_values"]
    assert pixels.dtype == np.float32 and pixels.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_allclose(pixels[0, 3, 3], (1 - np.array(IMAGE_MEAN)) / IMAGE_STD, rtol=1e-5)
    np.testing.assert_allclose(pixels[1, 3, 3], -np.array(IMAGE_MEAN) / IMAGE_STD, rtol=1e-5)


KINDS = {  # of processors: CLIP's, one that crops more, one that crops less, ViT's
    "CLIP": {}, "crop smaller": {"resize": 20}, "crop larger": {"resize": 11},
    "ViT": {"resize": (SIZE, SIZE), "resample": Image.Resampling.BILINEAR},
    "ViT, then a crop": {"resize": (20, 24), "resample": Image.Resampling.BILINEAR},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", ["wide.png", "wide.jpg", "large.jpg", "tall.png"])
def test_every_way_to_give_a_picture_makes_the_same_pixels(tmp_path, kind, file):
    """Path, bytes and dict are one, in use and, through the decoder, in training; an open picture is within a level."""
    size = {"wide": (64, 36), "large": (400, 300), "tall": (21, 50)}[file.split(".")[0]]
    smooth = noise(7, 5).resize(size, Image.Resampling.BICUBIC)
    smooth.save(tmp_path / file, quality=95)
    processor = CLIPProcessor(None, SIZE, 16, **KINDS[kind])
    path, content = str(tmp_path / file), (tmp_path / file).read_bytes()
    given = [path, tmp_path / file, content, {"bytes": content, "path": None}, {"bytes": None, "path": path}]
    expected = processor(images=given[0])["pixel_values"]
    assert expected.shape == (1, SIZE, SIZE, 3)
    for pixels in processor(images=given)["pixel_values"]:
        np.testing.assert_array_equal(pixels, expected[0])
    decoder = pickle.loads(pickle.dumps(processor.decoder))
    np.testing.assert_array_equal(processor.normalize(np.stack([decoder(one) for one in given])[:1]), expected)
    opened = decoder(Image.open(path)).astype(int)
    assert np.abs(opened - decoder(path)).max() <= (24 if file.endswith("jpg") else 1)  # decoded at 1/2 or 1/8


def test_a_stretch_is_to_height_and_width():
    image = noise(30, 50)
    expected = np.asarray(image.resize((20, 16), Image.Resampling.BICUBIC).crop((2, 0, 18, 16)))
    np.testing.assert_array_equal(decode_square(image, 16, resize=(16, 20)), expected)


def test_the_decoder_is_that_of_its_processor():
    image = noise(40, 20)
    for options in KINDS.values():
        processor = CLIPProcessor(None, SIZE, 16, **options)
        expected = decode_square(image, SIZE, **options)
        np.testing.assert_array_equal(processor.decoder(image), expected)
    assert len({processor_pixels.tobytes() for processor_pixels in (
        CLIPProcessor(None, SIZE, 16, **options).decoder(image) for options in KINDS.values())}) == len(KINDS)


def test_one_picture_or_one_text_is_a_batch_of_one(processor):
    batch = processor(images=noise(20, 20), text="kucing tidur")
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == 1


def test_nothing_to_do_is_an_error(processor):
    with pytest.raises(ValueError, match=r"images=.*text="):
        processor()


# Texts

def test_the_tokenizer_is_learned_from_the_captions():
    tokenizer = train_wordpiece(NAMES, 200)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(5))
    encoding = tokenizer.encode("Kucing TIDUR")
    assert encoding.tokens[0] == "[CLS]" and encoding.tokens[-1] == "[SEP]" and "[UNK]" not in encoding.tokens
    assert tokenizer.decode(encoding.ids) == "kucing tidur"
    assert "[UNK]" in tokenizer.encode("字").tokens
    assert tokenizer.get_vocab_size() <= 200


def test_the_tokenizer_is_the_same_each_time():
    assert train_wordpiece(NAMES, 120).get_vocab() == train_wordpiece(NAMES, 120).get_vocab()


words = st.lists(st.sampled_from(" ".join(NAMES).replace("-", " ").split()), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=40)
@given(st.lists(words, min_size=1, max_size=5))
def test_texts_do_not_depend_on_their_neighbours(patient, texts):
    batch = patient(text=texts)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int32
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = patient(text=[text])
        length = int(mask.sum())
        np.testing.assert_array_equal(ids[:length], alone["input_ids"][0])
        assert mask[:length].all() and not ids[length:].any() and alone["attention_mask"].all()
        assert patient.tokenizer.decode(list(ids)) == text


def test_capitals_and_spaces_do_not_matter(processor):
    one, other = processor(text=["Kucing  Tidur "]), processor(text=["kucing tidur"])
    np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


@pytest.mark.parametrize("text", ["", "   ", "\n"])
def test_an_empty_caption_is_an_error_that_names_its_row(processor, text):
    with pytest.raises(ValueError, match=r"text\[1\] is .*empty caption"):
        processor.tokenize(["kucing tidur", text])


def test_what_is_cut_is_counted_and_said_once(processor):
    long = " ".join(NAMES)
    with pytest.warns(UserWarning, match="1 of 2 texts are cut to 16 tokens"):
        batch = processor(text=[long, "kucing"])
    assert processor.truncated == 1
    ids = batch["input_ids"][0]
    assert len(ids) == 16 and ids[-1] == processor.tokenizer.token_to_id("[SEP]") and ids[0] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.tokenize([long, long], length=8)
    assert processor.truncated == 3


def test_a_fixed_length_pads_and_never_exceeds_the_towers(processor):
    batch = processor.tokenize(["kucing", "mobil merah"], length=12)
    assert batch["input_ids"].shape == (2, 12)
    assert not batch["attention_mask"][:, 8:].any()
    with pytest.warns(UserWarning):
        wide = processor.tokenize([" ".join(NAMES * 3)], length=40)
    assert wide["attention_mask"].sum() == 16


# The folder

def test_a_saved_processor_is_the_same_one(processor, folder):
    again, image, texts = CLIPProcessor.load(folder), noise(33, 21), ["kupu-kupu biru", "anjing laut kecil"]
    one, other = processor(images=[image], text=texts), again(images=[image], text=texts)
    for key in one:
        np.testing.assert_array_equal(one[key], other[key])
    assert (again.image_size, again.max_length) == (processor.image_size, processor.max_length)


def test_auto_tokenizer_opens_the_folder(processor, folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    texts = [*NAMES, "Kupu-kupu, BIRU!", "sesuatu yang tidak dikenal 字", " ".join(NAMES)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = processor(text=texts)
    batch = theirs(texts, padding=True, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(batch["input_ids"], ours["input_ids"])
    np.testing.assert_array_equal(batch["attention_mask"], ours["attention_mask"])
    assert theirs.model_max_length == processor.max_length
    assert (theirs.pad_token_id, theirs.cls_token_id, theirs.sep_token_id) == (0, 2, 3)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"])
def test_a_missing_file_is_named(processor, tmp_path, name):
    processor.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        CLIPProcessor.load(tmp_path)


def test_the_configs_are_those_of_hugging_face(folder):
    config = json.loads((folder / "preprocessor_config.json").read_text())
    assert config["crop_size"] == {"height": SIZE, "width": SIZE} and config["size"] == {"shortest_edge": SIZE}
    assert config["image_mean"] == list(IMAGE_MEAN) and config["resample"] == 3

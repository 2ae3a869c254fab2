"""Whole collections through a tower: the same vectors as one by one, in the same order, whatever the batch size."""

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from tiny import NAMES, SIZE, tiny_clip, tiny_pairs

from clipid_utils.model.embed import embed_images, embed_pixels, embed_texts


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def pictures():
    return [Image.fromarray(pixels) for pixels in tiny_pairs(11).images]


@pytest.fixture(scope="module")
def one_by_one(clip, pictures):
    model, processor = clip
    images = [model.encode_image(jnp.asarray(processor(images=[image])["pixel_values"]))[0] for image in pictures]
    tokens = [processor(text=[name]) for name in NAMES]
    texts = [model.encode_text(jnp.asarray(t["input_ids"]), jnp.asarray(t["attention_mask"]))[0] for t in tokens]
    return np.stack(images), np.stack(texts)


@settings(max_examples=12)
@given(count=st.integers(1, 11), batch_size=st.sampled_from([1, 4, 64]))
def test_pictures_are_embedded_in_order(clip, pictures, one_by_one, count, batch_size):
    out = embed_images(*clip, pictures[:count], batch_size, progress=False)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, one_by_one[0][:count], atol=1e-5)


@settings(max_examples=12)
@given(order=st.permutations(range(12)), count=st.integers(1, 12), batch_size=st.sampled_from([1, 5, 256]))
def test_texts_are_embedded_in_order(clip, one_by_one, order, count, batch_size):
    order = list(order)[:count]
    out = embed_texts(*clip, [NAMES[i] for i in order], batch_size)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, one_by_one[1][order], atol=1e-5)


def test_a_generator_of_pictures_of_any_kind(clip, pictures, one_by_one):
    np.testing.assert_allclose(embed_images(*clip, (p for p in pictures), 4, progress=False), one_by_one[0], atol=1e-5)
    odd = embed_images(*clip, [Image.new("RGBA", (7, 90)), Image.new("L", (50, 20), 30)], progress=False)
    np.testing.assert_allclose(np.linalg.norm(odd, axis=1), 1, atol=1e-5)


def test_pixels_that_are_ready(clip, one_by_one):
    pixels = clip[1].normalize(tiny_pairs(11).images)
    np.testing.assert_allclose(embed_pixels(clip[0], pixels, 4), one_by_one[0], atol=1e-5)


def test_nothing_is_no_rows(clip):
    assert embed_images(*clip, [], progress=False).shape == (0, 8)
    assert embed_texts(*clip, []).shape == (0, 8)
    assert embed_pixels(clip[0], np.zeros((0, SIZE, SIZE, 3), np.float32)).shape == (0, 8)


def test_an_empty_text_is_an_error(clip):
    with pytest.raises(ValueError, match=r"text\[1\].*empty caption"):
        embed_texts(*clip, ["kucing", " "])


def test_a_long_text_is_cut_not_refused(clip):
    with pytest.warns(UserWarning, match="cut to 16 tokens"):
        out = embed_texts(*clip, ["kucing tidur " * 40, "mobil"])
    assert out.shape == (2, 8)

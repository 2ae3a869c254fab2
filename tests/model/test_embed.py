"""Whole collections through a tower: the same vectors as one by one, in their order, and nothing embedded twice."""

import dataclasses
import io
import os
import threading

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from PIL import Image
from tiny import NAMES, SIZE, tiny_clip, tiny_pairs

from clipid_utils import HybridCLIP
from clipid_utils.model import embed
from clipid_utils.model.config import EfficientNetConfig, VisionConfig
from clipid_utils.model.embed import (
    embed_images,
    embed_pictures,
    embed_pixels,
    embed_texts,
    fingerprint,
    picture_identity,
)
from clipid_utils.model.processor import CLIPProcessor


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
    for out in (embed_images(*clip, pictures[:count], batch_size, progress=False),
                embed_pictures(*clip, pictures[:count], batch_size=batch_size, progress=False).vectors):
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, one_by_one[0][:count], atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_groups_of_a_batch_give_the_same_vectors(clip, pictures, one_by_one, monkeypatch, group):
    """On a CPU a batch of large pictures is computed in groups; a group that does not divide it is left out."""
    monkeypatch.setattr(embed, "_group", lambda model, method: group)
    for size in (4, 5):
        out = embed_images(*clip, pictures[:size], size, progress=False)
        np.testing.assert_allclose(out, one_by_one[0][:size], atol=1e-5)


def test_an_encoder_has_the_weights_of_each_call(pictures):
    model, processor = tiny_clip(seed=1)
    encode, pixels = embed.encoder(model, "encode_image"), processor(images=pictures[:2])["pixel_values"]
    before = encode(pixels)
    model.vision.projection.kernel[...] *= -1
    np.testing.assert_allclose(encode(pixels), -before, atol=1e-6)


def test_only_large_pictures_on_a_cpu_are_grouped(clip, monkeypatch):
    def tower(config):
        model = nnx.Module()
        model.config = config
        return model

    small, large = VisionConfig(), VisionConfig(patch_size=16)
    lite = EfficientNetConfig()
    groups = [embed._group(tower(config), "encode_image") for config in (small, large, lite)]
    assert groups == [embed.WHOLE, 8, 2]
    assert embed._group(tower(large), "encode_text") == embed.WHOLE
    monkeypatch.setattr("jax.default_backend", lambda: "gpu")
    assert embed._group(tower(lite), "encode_image") == embed.WHOLE


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
    assert embed_pictures(*clip, [], progress=False).vectors.shape == (0, 8)


def test_an_empty_text_is_an_error(clip):
    with pytest.raises(ValueError, match=r"text\[1\].*empty caption"):
        embed_texts(*clip, ["kucing", " "])


def test_a_long_text_is_cut_not_refused(clip):
    with pytest.warns(UserWarning, match="cut to 16 tokens"):
        out = embed_texts(*clip, ["kucing tidur " * 40, "mobil"])
    assert out.shape == (2, 8)


# Pictures in files, with a cache

@pytest.fixture
def files(tmp_path, pictures):
    """Eleven pictures and one broken file, in the fourth place."""
    paths = []
    for row, picture in enumerate(pictures):
        paths.append(tmp_path / f"{row:02}.png")
        picture.resize((40, 24)).save(paths[-1])
    (tmp_path / "rusak.png").write_bytes(b"x")
    return [*paths[:3], tmp_path / "rusak.png", *paths[3:]]


@pytest.fixture
def decoded(monkeypatch):
    """The pictures that are decoded; `decoded.limit` is the one at which Ctrl-C comes."""
    class Decoded(list):
        limit = None

    seen, decoder = Decoded(), CLIPProcessor.decoder

    def decode(processor, picture):
        if not isinstance(picture, Image.Image):  # the fingerprint's
            seen.append(picture)
            if seen.limit == len(seen):
                raise KeyboardInterrupt
        return decoder.fget(processor)(picture)

    monkeypatch.setattr(CLIPProcessor, "decoder", property(lambda self: lambda picture: decode(self, picture)))
    return seen


def known(files) -> np.ndarray:
    return np.array([picture_identity(path) for path in files], "S20")


def test_files_bytes_records_and_pixels_give_the_same(clip, files):
    good = [path for path in files if path.name != "rusak.png"]
    expected = clip[0].encode_image(clip[1].normalize(np.stack([clip[1].decoder(path) for path in good])))
    contents = [path.read_bytes() for path in good]
    for kind in (good, [str(path) for path in good], contents, [{"bytes": one, "path": None} for one in contents],
                 [{"bytes": None, "path": str(path)} for path in good],
                 np.stack([clip[1].decoder(path) for path in good])):
        np.testing.assert_allclose(embed_pictures(*clip, kind, progress=False).vectors, expected, atol=1e-5)


def test_unreadable_pictures_are_skipped_and_counted(clip, files, capsys):
    more = [*files, b"x", {"bytes": b"x", "path": None}]
    vectors, skipped = embed_pictures(*clip, more, batch_size=4, progress=False)
    assert list(skipped) == [3, 12, 13] and not np.isfinite(vectors[[3, 12, 13]]).any()
    assert np.isfinite(np.delete(vectors, [3, 12, 13], axis=0)).all() and "not a picture" in skipped[3]
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("3 of 14 pictures could not be read: rusak.png (not a picture")
    assert "row 12 (" in line and "row 13 (" in line and "…" not in line
    embed_pictures(*clip, [b"x"] * 6, progress=False)
    assert capsys.readouterr().err.strip().endswith(", …")
    embed_pictures(*clip, files[:2], progress=False)
    assert capsys.readouterr().err == ""


def test_an_interrupted_call_continues_and_a_second_one_embeds_nothing(clip, files, tmp_path, decoded):
    options = {"identities": known(files), "batch_size": 2, "chunk": 4, "progress": False}
    whole, skipped = embed_pictures(*clip, files, **options)
    decoded.clear()
    decoded.limit = 9
    with pytest.raises(KeyboardInterrupt):
        embed_pictures(*clip, files, cache=tmp_path / "cache", **options)
    for thread in threading.enumerate():  # that still decode what the call has asked for
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join()
    chunks = list((tmp_path / "cache").iterdir())
    assert sorted(path.suffix for path in chunks) == [".npz"]  # four or five of eight: the next four were not complete
    decoded.limit, kept = None, sum(len(np.load(path)["identities"]) for path in chunks)
    assert 4 <= kept <= 5
    decoded.clear()
    again = embed_pictures(*clip, files, cache=tmp_path / "cache", **options)
    assert len(decoded) == 12 - kept
    np.testing.assert_array_equal(again.vectors, whole)
    decoded.clear()
    last = embed_pictures(*clip, files[::-1], cache=tmp_path / "cache", **{**options, "identities": known(files[::-1])})
    assert decoded == [files[3]]  # the broken one is tried again
    np.testing.assert_array_equal(last.vectors, whole[::-1])
    assert again.skipped == skipped and last.skipped == {8: skipped[3]}


def test_a_damaged_chunk_is_made_again(clip, files, tmp_path, decoded):
    options = {"identities": known(files), "cache": tmp_path / "cache", "batch_size": 2, "chunk": 6, "progress": False}
    whole = embed_pictures(*clip, files, **options).vectors
    first, second = sorted((tmp_path / "cache").iterdir())
    first.write_bytes(first.read_bytes()[:100])
    decoded.clear()
    with pytest.warns(UserWarning, match="embedded again"):
        np.testing.assert_array_equal(embed_pictures(*clip, files, **options).vectors, whole)
    assert len(decoded) == 12 - len(np.load(second)["identities"])
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_equal_pictures_are_embedded_once(clip, files, decoded):
    twice = [files[0], files[1], files[3], files[0], files[3]]
    vectors, skipped = embed_pictures(*clip, twice, identities=known(twice), progress=False)
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert len(decoded) == 3 and list(skipped) == [2, 4] and skipped[2] == skipped[4]


def test_few_pictures_are_decoded_ahead(clip, files, decoded, monkeypatch):
    """However many there are, two batches wait at most."""
    at, normalize = [], clip[1].normalize
    monkeypatch.setattr(clip[1], "normalize", lambda pixels: at.append(len(decoded)) or normalize(pixels))
    embed_pictures(*clip, files[:1] * 40, batch_size=2, progress=False)
    assert len(at) == 20 and all(count <= 2 * (batch + 1) + 4 for batch, count in enumerate(at))


def test_towers_without_their_projection_into_an_array_of_the_callers(clip, files):
    out = np.zeros((12, 16), np.float16)
    found = embed_pictures(*clip, files, out=out, projected=False, batch_size=4, progress=False)
    assert found.vectors is out
    pixels = clip[1].normalize(np.stack([clip[1].decoder(path) for path in files[:3]]))
    np.testing.assert_allclose(out[:3], clip[0].vision.pooled(pixels), rtol=2e-3, atol=1e-4)
    exact = embed_pictures(*clip, files, projected=False, progress=False).vectors
    assert exact.dtype == np.float32 and exact.shape == (12, 16)


def test_vectors_that_are_not_finite_are_an_error(files):
    model, processor = tiny_clip()
    model.vision.ln_post.scale[...] = jnp.full_like(model.vision.ln_post.scale[...], 1e6)
    with pytest.raises(ValueError, match="pictures 0 to 12 is not finite in float16: use float32"):
        embed_pictures(model, processor, files, out=np.zeros((12, 16), np.float16), projected=False, progress=False)


def test_the_fingerprint_changes_with_weights_settings_and_dtype():
    first = fingerprint(*tiny_clip())
    assert len(first) == 16 and first == fingerprint(*tiny_clip())
    model, processor = tiny_clip()
    half = nnx.clone(model)
    half.logit_scale[...] = half.logit_scale[...].astype(jnp.bfloat16)
    found = {first, fingerprint(*tiny_clip(seed=1)), fingerprint(*tiny_clip(dtype=jnp.bfloat16)),
             fingerprint(*tiny_clip(max_logit_scale=3.0)), fingerprint(half, processor)}
    for state in (model.vision.projection.kernel, model.text.projection.kernel, model.logit_scale):
        state[...] = state[...] + 1e-3
        found.add(fingerprint(model, processor))
    assert len(found) == 8


def test_a_towers_fingerprint_leaves_a_part_out():
    (model, processor), (other, _) = tiny_clip(), tiny_clip(seed=1)
    before = fingerprint(model.vision, processor, without="projection")
    model.vision.projection = other.vision.projection
    assert fingerprint(model.vision, processor, without="projection") == before != fingerprint(model.vision, processor)
    model.vision.ln_post.scale[...] = model.vision.ln_post.scale[...] + 1e-3
    assert fingerprint(model.vision, processor, without="projection") != before
    bfloat = tiny_clip(dtype=jnp.bfloat16)[0]
    assert fingerprint(bfloat.vision, processor) != fingerprint(tiny_clip()[0].vision, processor)


def test_a_file_that_cannot_be_read_is_known_by_its_path(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError

    (tmp_path / "a.jpg").touch()
    monkeypatch.setattr(embed, "file_identity", refused)
    assert len({picture_identity(tmp_path / name) for name in ("a.jpg", "b.jpg")}) == 2


def test_an_identity_changes_with_the_picture(tmp_path):
    path, buffer = tmp_path / "a.bmp", io.BytesIO()
    Image.new("RGB", (90, 90)).save(buffer, "BMP")
    path.write_bytes(buffer.getvalue())
    first = picture_identity(path)
    assert picture_identity({"bytes": None, "path": str(path)}) == first == picture_identity(str(path))
    other = tmp_path / "b.bmp"
    other.write_bytes(buffer.getvalue())
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    contents = {picture_identity(one) for one in (b"a", b"b", {"bytes": b"c", "path": "a"}, tiny_pairs(1).images)}
    assert picture_identity(b"a") == picture_identity({"bytes": b"a", "path": str(path)})
    assert len({first, picture_identity(other), picture_identity(tmp_path / "c.bmp"), *contents}) == 7
    assert embed.HEAD < path.stat().st_size


def test_a_fingerprint_knows_settings_that_the_repr_leaves_out(clip):
    model, processor = clip
    before = fingerprint(model, processor)
    later = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, normalize_pooled=True))
    other = HybridCLIP(later, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(model))
    assert repr(later) == repr(model.config) and fingerprint(other, processor) != before

"""The vectors of a table's pictures; `tests/data/test_scale.py` has the same through Ray."""

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tiny import tiny_clip

from clipid_utils import save_clip
from clipid_utils.inference.embed_shards import EmbedPictures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "clip"
    save_clip(*tiny_clip(), folder, format="native")
    Image.new("RGB", (20, 20), "red").save(folder.parent / "a.png")
    return folder


def test_pictures_by_path_start_at_the_root(checkpoint):
    embed = EmbedPictures(checkpoint, root=checkpoint.parent)
    table = embed(pa.table({"image_path": ["a.png", "gone.png", None]}))
    assert [vector is None for vector in table["image_embeds"].to_pylist()] == [False, True, True]
    with pytest.raises(ValueError, match=r"none of 2 pictures is there, the first of them .*/b/a.png'.*root="):
        EmbedPictures(checkpoint, root=checkpoint / "b")(pa.table({"image_path": ["a.png", None, "gone.png"]}))
    with pytest.raises(ValueError, match="columns x, but not image or image_path"):
        embed(pa.table({"x": [1]}))


def test_a_file_that_breaks_amid_its_pixels_is_a_broken_picture_like_others(checkpoint):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    noise.save(data := io.BytesIO(), "PNG")
    good = data.getvalue()
    place = good.rindex(b"IDAT")
    broken = good[:place] + b"\0DAT" + good[place + 4 :]  # Pillow raises SyntaxError
    table = EmbedPictures(checkpoint)(pa.table({"image": [broken, good]}))
    first, second = table["image_embeds"].to_pylist()
    assert first is None and table["image_embeds"].type == pa.list_(pa.float32())
    model, processor = tiny_clip()
    pixels = processor.normalize(processor.decoder(good)[None])
    np.testing.assert_allclose([second], model.encode_image(pixels), atol=1e-5)

"""Heat maps by covering squares and by patches."""

import numpy as np
import pytest
from colour_model import COLOURS, PATCH, SIZE, colour_clip, spot
from PIL import Image

from clipid_utils.inference import heatmap
from clipid_utils.model.embed import embed_texts

GRID = SIZE // PATCH


@pytest.fixture(scope="module")
def clip():
    return colour_clip()


def two_spots() -> Image.Image:
    """Red in the cell of row 0, column 3; blue in the cell of row 2, column 1."""
    image = Image.new("RGB", (SIZE, SIZE), "white")
    image.paste(COLOURS["merah"], (24, 0, 32, 8))
    image.paste(COLOURS["biru"], (8, 16, 16, 24))
    return image


@pytest.mark.parametrize(("text", "place", "other"), [("merah", (0, 3), (2, 1)), ("biru", (2, 1), (0, 3))])
def test_both_maps_peak_where_the_colour_is(clip, text, place, other):
    covered = heatmap.occlusion(*clip, two_spots(), text, window=1)
    patches = heatmap.patch_similarity(*clip, two_spots(), text)
    for heat in (covered, patches):
        assert heat.shape == (GRID, GRID) and heat.dtype == np.float32
        assert np.unravel_index(heat.argmax(), heat.shape) == place
    assert covered[place] > 0 > covered[other]  # without the other colour the text fits better


def test_the_colour_that_covers(clip):
    """Against the definition, on a picture whose edge is red for a quarter: its median is white, its mean is not."""
    model, processor = clip
    text, image = embed_texts(model, processor, ["merah"])[0], spot("merah", (0, 0, 32, 8))
    heat = heatmap.occlusion(model, processor, image, "merah", window=1)
    pixels = processor(images=[image])["pixel_values"][0]
    expected = np.zeros((4, 4))
    for row, column in np.ndindex(4, 4):
        covered = pixels.copy()
        covered[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1.0
        before, after = np.asarray(model.encode_image(np.stack([pixels, covered]))) @ text
        expected[row, column] = before - after
    np.testing.assert_allclose(heat, expected, atol=1e-6)
    assert np.ptp(heat) > 1e-4


def test_taking_other_texts_off_flattens_what_they_share(clip):
    plain = heatmap.patch_similarity(*clip, two_spots(), "merah")
    same = heatmap.patch_similarity(*clip, two_spots(), "merah", against=["merah"])
    assert plain.max() > 0.5 and np.abs(same).max() < 1e-6


def test_masks_cover_the_picture_and_nothing_else():
    masks = heatmap.occlusion_masks((32, 32), 4, window=1)
    assert masks.shape == (16, 32, 32) and (masks.sum(axis=0) == 1).all()
    assert heatmap.occlusion_masks((32, 32), 4, window=2).any(axis=0).all()

"""Heat maps: the squares of a picture that a text describes.

There are two ways, and both need only the encoders. `occlusion` asks the model again with each square covered: it is
slow, but it shows what the model really does. `patch_similarity` compares the text with every patch of one forward
pass: it is fast, but only as good as the patches' own vectors, which training never compared with a text. Both maps
cover the picture's middle square, because the model sees no more of it.
"""

import numpy as np
from flax import nnx
from jaxtyping import Float
from PIL import Image

from clipid_utils.model.embed import embed_pixels, embed_texts, encoder


def occlusion(
    model: nnx.Module, processor: object, image: Image.Image, text: str, window: float | int = 2
) -> Float[np.ndarray, "grid grid"]:
    """How much the similarity of picture and text falls when a square around each cell is covered.

    It is positive where the picture fits the text, negative where it contradicts the text (Zeiler & Fergus 2014). There
    are as many cells along a side as patches. The square is `window` cells wide, more than one because half a cat is
    still a cat, and has the median colour of the picture's edge: a square of a different colour is itself visible.
    """
    grid = model.config.vision.grid
    pixels = np.asarray(processor(images=[image])["pixel_values"], np.float32)  # [1, H, W, 3]
    covers = occlusion_masks(pixels.shape[1:3], grid, window)  # [grid * grid, H, W]
    edges = pixels[0, 0], pixels[0, -1], pixels[0, 1:-1, 0], pixels[0, 1:-1, -1]
    covered = np.where(covers[..., None], np.median(np.concatenate(edges), axis=0), pixels)
    similarity = embed_pixels(model, np.concatenate([pixels, covered])) @ embed_texts(model, processor, [text])[0]
    return (similarity[0] - similarity[1:]).astype(np.float32).reshape(grid, grid)


def occlusion_masks(size: tuple[int, int], grid: int, window: float | int = 2) -> np.ndarray:
    """Boolean masks [grid * grid, H, W], row by row: a square `window` cells wide around the middle of each cell."""
    middles = np.arange(grid)[:, None] + 0.5  # in cells
    rows, columns = (np.abs((np.arange(side) + 0.5) * grid / side - middles) < window / 2 for side in size)
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(grid * grid, *size)


def patch_similarity(
    model: nnx.Module, processor: object, image: Image.Image, text: str, against: list[str] | None = None
) -> Float[np.ndarray, "grid grid"]:
    """Cosine similarity of the text with every patch of the picture, in one forward pass (Zhou et al. 2022, MaskCLIP).

    With `against`, a list of other texts, their mean similarity is subtracted from each patch: a similarity that all
    texts share says nothing about this one (Li et al. 2023, CLIP Surgery). Without it the empty ground often wins.
    """
    embeds = embed_texts(model, processor, [text])[0]  # [E]
    if against:
        embeds = embeds - embed_texts(model, processor, list(against)).mean(axis=0)
    patches = encoder(model, "encode_patches")(processor(images=[image])["pixel_values"])[0]  # [P, E]
    grid = model.config.vision.grid
    return (patches @ embeds).astype(np.float32).reshape(grid, grid)

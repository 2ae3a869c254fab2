"""Random affine and colour changes in JAX, inside the compiled step; each picture has its own key."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, UInt8

# A hue turns by rotation about the grey axis in YIQ (Foley et al., Computer Graphics), as one matrix on RGB
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_TO_RGB = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges of the random changes: uniform between ± the value (scale: between its bounds); 0 turns a change off."""

    degrees: float = 7.0  # of rotation
    shear: float = 0.07  # sideways, as a slope: 0.07 is about 4 degrees
    translate: float = 0.08  # of the side, both ways
    scale: tuple[float, float] = (0.8, 1.15)  # of the picture in its frame
    stretch: float = 0.1  # width against height, as a logarithm
    flip: float = 0.5  # chance, where the caption allows it
    brightness: float = 0.15  # added to all values, which go from 0 to 1
    contrast: float = 0.25  # of the distance from the middle grey
    saturation: float = 0.4  # of the distance from the grey of the same lightness
    hue: float = 0.05  # of a full turn
    grey: float = 0.05  # chance
    shading: float = 0.2  # a linear light across the picture, like drawn highlights and shadows


class Affine(NamedTuple):
    """How one picture is moved: the map from output to input coordinates, both in [-1, 1]."""

    matrix: Float[Array, "2 2"]
    shift: Float[Array, " 2"]


def draw_affine(key: Key[Array, ""], may_flip: Bool[Array, ""], config: AugmentConfig) -> Affine:
    """A random rotation, shear, stretch, scale, flip and shift."""
    keys = jax.random.split(key, 7)
    angle = jnp.deg2rad(config.degrees) * jax.random.uniform(keys[0], minval=-1, maxval=1)
    shear = config.shear * jax.random.uniform(keys[1], minval=-1, maxval=1)
    stretch = jnp.exp(config.stretch * jax.random.uniform(keys[2], minval=-1, maxval=1) / 2)
    scale = jax.random.uniform(keys[3], minval=config.scale[0], maxval=config.scale[1])
    flip = jnp.where(may_flip & jax.random.bernoulli(keys[4], config.flip), -1.0, 1.0)
    shift = 2 * config.translate * jax.random.uniform(keys[5], (2,), minval=-1, maxval=1)
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    matrix = rotation @ jnp.array([[1.0, shear], [0.0, 1.0]]) @ jnp.diag(jnp.stack([flip / stretch, stretch]))
    return Affine(matrix / scale, shift)


def warp(image: Float[Array, "H W 3"], affine: Affine, size: int) -> Float[Array, "size size 3"]:
    """Bilinear resampling of `image` to `size` x `size`; outside of the image is white."""
    height, width, _ = image.shape
    steps = (jnp.arange(size) + 0.5) * 2 / size - 1
    x, y = jnp.meshgrid(steps, steps)  # [size, size]
    place = jnp.stack([x, y], -1) @ affine.matrix.T + affine.shift
    column, row = (place[..., 0] + 1) * width / 2 - 0.5, (place[..., 1] + 1) * height / 2 - 0.5
    column0, row0 = jnp.floor(column), jnp.floor(row)
    flat, total = image.reshape(-1, 3), 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            c, r = column0 + dx, row0 + dy
            weight = (1 - jnp.abs(column - c)) * (1 - jnp.abs(row - r))
            inside = (c >= 0) & (c < width) & (r >= 0) & (r < height)
            index = (jnp.clip(r, 0, height - 1) * width + jnp.clip(c, 0, width - 1)).astype(jnp.int32)
            total += weight[..., None] * jnp.where(inside[..., None], flat[index], 1.0)
    return total


def recolour(key: Key[Array, ""], image: Float[Array, "H W 3"], config: AugmentConfig) -> Float[Array, "H W 3"]:
    """Random hue, saturation (or grey), contrast, brightness and shading; values stay in [0, 1]."""
    keys = jax.random.split(key, 7)

    def draw(k, bound):
        return bound * jax.random.uniform(k, minval=-1, maxval=1)

    turn = 2 * jnp.pi * draw(keys[0], config.hue)
    colour = jnp.where(jax.random.bernoulli(keys[1], config.grey), 0.0, 1 + draw(keys[2], config.saturation))
    cos, sin = colour * jnp.cos(turn), colour * jnp.sin(turn)
    chroma = jnp.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]])
    chroma = chroma.at[1, 1].set(cos).at[1, 2].set(-sin).at[2, 1].set(sin).at[2, 2].set(cos)
    image = image @ (_TO_RGB @ chroma @ _TO_YIQ).T
    image = (image - 0.5) * (1 + draw(keys[3], config.contrast)) + 0.5 + draw(keys[4], config.brightness)
    direction = 2 * jnp.pi * jax.random.uniform(keys[5])
    line = jnp.linspace(-1, 1, image.shape[0])
    light = jnp.cos(direction) * line[None, :] + jnp.sin(direction) * line[:, None]
    ink = 1 - jnp.min(image, axis=-1)  # white paper is not shaded
    return jnp.clip(image + (draw(keys[6], config.shading) * light * ink)[..., None], 0, 1)


def augment(
    keys: Key[Array, " B"], images: UInt8[Array, "B H W 3"], may_flip: Bool[Array, " B"], size: int,
    config: AugmentConfig,
) -> Float[Array, "B size size 3"]:
    """Each picture moved and recoloured by its own key, at `size` pixels, in [0, 1].

    A picture is mirrored only if `may_flip` allows it: mirroring would make a caption with kiri (left) or kanan (right)
    false, and letters in the picture unreadable.
    """

    def move(key, image, may_flip):
        return warp(image.astype(jnp.float32) / 255, draw_affine(key, may_flip, config), size)

    moving, colouring = jax.vmap(jax.random.split, out_axes=1)(keys)
    # Without the barrier XLA fuses both parts and resamples a pixel again for each of its uses: 100 ms instead of 30
    moved = jax.lax.optimization_barrier(jax.vmap(move)(moving, images, may_flip))
    return jax.vmap(lambda key, image: recolour(key, image, config))(colouring, moved)

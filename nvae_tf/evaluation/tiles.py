"""Images larger than those of training, tile by tile: reconstructions and maps of likelihood.

Tiles of the model's size overlap, and each is encoded, reconstructed and scored as an image of its own.
What several tiles say of a pixel is blended, the more the nearer the pixel is to a tile's centre. The
results are maps: where an image is unlike the training images, and by how much. They are not a
likelihood of the large image, for which the model has no distribution: pixels of neighbouring tiles are
not conditioned on each other, and a pixel is scored by several tiles.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nvae_tf.checks import check_count, check_groups, check_values
from nvae_tf.engine.devices import on_devices, shard, unshard
from nvae_tf.io.errors import UserError, short_repr
from nvae_tf.layers.latent_group import FromPosterior
from nvae_tf.model import NVAE


class Tiles(NamedTuple):
    """What the tiles of an image say.

    Attributes:
        reconstruction: Blended means of p(x | z), (height, width, channels) in [0, 1].
        neg_log_likelihood: Blended -log p(x | z) of each pixel with all its channels, in nats,
            (height, width).
        bits: The same and each tile's KL, spread evenly over its pixels, in bits per dimension,
            (height, width). For a single tile the mean is the NELBO.
        kl: KL of each tile and group in nats, (tiles, groups).
        positions: Row and column of each tile's upper left pixel, (tiles, 2).
        size: Height and width of a tile.
        z: The draws of z of the groups that were asked for, (tiles, height, width, latents) each.
    """

    reconstruction: np.ndarray
    neg_log_likelihood: np.ndarray
    bits: np.ndarray
    kl: np.ndarray
    positions: np.ndarray
    size: tuple[int, int]
    z: list[np.ndarray]


def tile_size(model: NVAE) -> tuple[int, int]:
    """Height and width of a tile: the scored part of the model's images."""
    return model.image.scored_size or model.image.shape[:2]


def score(
    model: NVAE,
    image,
    *,
    stride: int | None = None,
    batch_size: int = 100,
    seed: int = 1,
    groups: Sequence[int] = (),
) -> Tiles:
    """Encodes, reconstructs and scores an image by overlapping tiles, with one draw of z for each.

    Args:
        model: The model.
        image: Image (height, width, channels) in [0, 1], at least as large as a tile.
        stride: Pixels from a tile to the next, at most a tile's sides; default: half a tile.
        batch_size: Tiles that are computed at once.
        seed: Seed of the draws.
        groups: Indices of the groups whose z is returned.

    Raises:
        UserError: The image or the stride do not fit the tiles, or another argument is wrong.
    """
    check_count("batch_size", batch_size)
    check_count("seed", seed, minimum=0)
    check_groups(groups, len(model.groups))
    if not hasattr(image, "shape"):
        raise UserError(f"image: {short_repr(image)} is not allowed; expected an array")
    image, size = np.asarray(image, np.float32), tile_size(model)
    positions = tile_positions(model, image, stride)
    check_values("image", image, model.image)
    weights = _blending_weights(size)
    pixels = math.prod(size)
    run = on_devices(lambda tiles, indices: _score_tiles(model, tiles, indices, seed, groups))
    sums = np.zeros((*image.shape[:2], model.image.channels + 3), np.float32)
    all_kl, all_z = [], []
    with tqdm(total=len(positions), unit="tile", desc="tiles", disable=None) as bar:
        for start in range(0, len(positions), batch_size):
            batch = positions[start : start + batch_size]
            tiles = np.stack([_cut(model, image, size, *position) for position in batch])
            indices = np.arange(start, start + len(batch), dtype=np.int64)
            results = unshard(run(shard(tiles), shard(indices)), len(batch))
            shown, nats, kl, *z = (tensor.numpy() for tensor in results)
            all_kl.append(kl)
            all_z.append(z)
            bits = model.bits_per_dim(nats * pixels + kl.sum(1)[:, None, None])
            values = np.concatenate(
                [shown, nats[..., None], bits[..., None], np.ones_like(nats)[..., None]], -1
            )
            for (top, left), part in zip(batch, values, strict=True):
                sums[top : top + size[0], left : left + size[1]] += weights[..., None] * part
            bar.update(len(batch))
    blended = sums[..., :-1] / sums[..., -1:]
    return Tiles(
        blended[..., :-2],
        blended[..., -2],
        blended[..., -1],
        np.concatenate(all_kl),
        positions,
        size,
        [np.concatenate(parts) for parts in zip(*all_z, strict=True)],
    )


def _score_tiles(model: NVAE, tiles, indices, seed: int, groups: Sequence[int]):
    """Means, -log p(x | z) of each pixel, KL of each group, and z of some, for tiles as images."""
    rows, columns = model.image.scored_part
    noise = model.draw_noise(indices, (seed, 0))
    output = model.top_down(FromPosterior(model.bottom_up(tiles), noise))
    shown = model.render(output.parameters)[:, rows, columns]
    nats = -model.pixel_log_likelihood(output.parameters, tiles)
    return [shown, nats, output.kl_per_group, *(output.latents[group].z for group in groups)]


def _cut(model: NVAE, image, size: tuple[int, int], top: int, left: int) -> np.ndarray:
    """One tile, padded as the model's images are."""
    rows, columns = model.image.scored_part
    tile = image[top : top + size[0], left : left + size[1]]
    above, before = rows.start, columns.start
    below, after = model.image.height - rows.stop, model.image.width - columns.stop
    return np.pad(tile, [(above, below), (before, after), (0, 0)])


def tile_positions(model: NVAE, image: np.ndarray, stride: int | None = None) -> np.ndarray:
    """Row and column of the upper left pixels of tiles that cover an image, (tiles, 2).

    Args:
        model: The model.
        image: Image (height, width, channels), of which only the shape counts.
        stride: As for `score`.

    Raises:
        UserError: The image or the stride do not fit the tiles.
    """
    size = height, width = tile_size(model)
    if image.ndim != 3 or image.shape[-1] != model.image.channels:
        raise UserError(
            f"image: shape {image.shape}; expected (height, width, {model.image.channels})"
        )
    if image.shape[0] < height or image.shape[1] < width:
        raise UserError(
            f"image: {image.shape[1]}x{image.shape[0]} pixels are fewer than a tile of "
            f"{width}x{height}; give a larger image"
        )
    check_count("stride", stride, optional=True)
    if stride is not None and stride > min(size):
        raise UserError(f"stride: {stride} is not allowed; expected 1 to {min(size)} pixels")
    starts = []
    for length, side in zip(image.shape[:2], size, strict=True):
        step = stride or max(side // 2, 1)
        starts.append([*range(0, length - side, step), length - side])
    return np.array([(top, left) for top in starts[0] for left in starts[1]])


def _blending_weights(size: tuple[int, int]) -> np.ndarray:
    """Weights of a tile's pixels, which fall linearly from its centre to its edges."""
    sides = [np.minimum(np.arange(n) + 1, n - np.arange(n)).astype(np.float32) for n in size]
    return sides[0][:, None] * sides[1] / (sides[0].max() * sides[1].max())

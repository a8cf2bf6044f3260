"""Arrays of images as elements of the page, which hold their pixels themselves."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from nvae_tf.io.image_grid import enlarge

MIN_WIDTH = 96  # pixels of an image, at least: the browser makes it smaller, and never blurred
GAP, WIDE_GAP = 6, 24  # pixels between enlarged images, which are transparent
FILM_QUALITY = 80  # of WebP, up to 100
LONGEST_SIDE = 16383  # pixels of a WebP


def image_element(images, columns: int, alt: str, wide_gaps: Sequence[int] = ()) -> str:
    """A grid of images as one ``<img>``, exact to the pixel.

    Args:
        images: Images (n, height, width, channels), 8-bit or in [0, 1]; rows are filled one by one.
        columns: Number of images in a row.
        alt: What is shown, for those who cannot see it.
        wide_gaps: Columns after which there is a wider gap.
    """
    canvas = sprite(images, columns, wide_gaps)
    content = io.BytesIO()
    Image.fromarray(canvas).save(content, "WEBP", lossless=True, method=4)
    return _element(content.getvalue(), canvas.shape, alt)


def film_element(frames: Sequence, columns: int, alt: str, milliseconds: int) -> str:
    """Grids of images as one moving ``<img>``, which begins again at its end.

    Args:
        frames: For each moment, images (n, height, width, channels).
        columns: Number of images in a row.
        alt: What is shown, for those who cannot see it.
        milliseconds: Duration of a frame.
    """
    canvases = [sprite(images, columns) for images in frames]
    pictures = [Image.fromarray(canvas) for canvas in canvases]
    content = io.BytesIO()
    pictures[0].save(
        content,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=milliseconds,
        loop=0,
        quality=FILM_QUALITY,
    )
    return _element(content.getvalue(), canvases[0].shape, alt)


def sprite(images, columns: int, wide_gaps: Sequence[int] = ()) -> np.ndarray:
    """Arranges images row by row, with transparent gaps, through which the page is seen.

    Args:
        images: As for `image_element`.
        columns: Number of images in a row.
        wide_gaps: As for `image_element`.

    Returns:
        One 8-bit RGBA image (height, width, 4).
    """
    enlarged = enlarge(images, MIN_WIDTH)
    columns = min(columns, len(enlarged))
    rows = -(-len(enlarged) // columns)
    enlarged = _within(enlarged, LONGEST_SIDE // rows - GAP, LONGEST_SIDE // columns - WIDE_GAP)
    _, height, width, _ = enlarged.shape
    gaps = [WIDE_GAP if column in wide_gaps else GAP for column in range(columns - 1)]
    lefts = np.cumsum([0, *(width + gap for gap in gaps)])
    canvas = np.zeros((rows * (height + GAP) - GAP, lefts[-1] + width, 4), np.uint8)
    for index, image in enumerate(enlarged):
        top, left = index // columns * (height + GAP), lefts[index % columns]
        canvas[top : top + height, left : left + width, :3] = image
        canvas[top : top + height, left : left + width, 3] = 255
    return canvas


def _within(images, height: int, width: int) -> np.ndarray:
    """Shrinks 8-bit RGB images (n, height, width, 3) that are larger than a height or a width."""
    portion = min(height / images.shape[1], width / images.shape[2])
    if portion >= 1.0:
        return images
    size = max(1, int(portion * images.shape[2])), max(1, int(portion * images.shape[1]))
    return np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in images])


def _element(content: bytes, shape, alt: str) -> str:
    encoded = base64.b64encode(content).decode()
    return (
        f'<img src="data:image/webp;base64,{encoded}" width="{shape[1]}" height="{shape[0]}" '
        f'alt="{html.escape(alt)}">'
    )

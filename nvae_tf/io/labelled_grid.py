"""The one look of every picture that is written: grids of images with a title, labels and captions.

Small images are enlarged a whole number of times, so that every pixel of theirs is a square.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nvae_tf.io.image_grid import enlarge

MIN_WIDTH = 64  # pixels of an enlarged image, at least
GAP, BAND_GAP, MARGIN = 4, 16, 16  # pixels between images, between bands, and around everything
TITLE_SIZE, TEXT_SIZE, CAPTION_SIZE = 20, 14, 12  # pixels
PAPER, INK, GREY = (255, 255, 255), (31, 35, 40), (99, 108, 118)


class Band(NamedTuple):
    """Rows of images that share a label.

    Attributes:
        images: Images (n, height, width, channels), 8-bit or in [0, 1]; the rows are filled one after
            the other.
        label: What is written to the left of the rows; it may have several lines.
        captions: Lines of text below each image, as many for one as for another; default: none.
    """

    images: np.ndarray
    label: str = ""
    captions: Sequence[Sequence[str]] = ()


def reconstruction_bands(
    originals, reconstructions, columns: int, captions: Sequence[Sequence[str]] = ()
) -> list[Band]:
    """Rows of images, each followed by the row of their reconstructions.

    Args:
        originals: Images (n, height, width, channels).
        reconstructions: Their reconstructions, of the same shape.
        columns: Number of images in a row.
        captions: Lines of text below each reconstruction.
    """
    bands = []
    for start in range(0, len(originals), columns):
        row = slice(start, start + columns)
        bands.append(Band(originals[row], "original"))
        bands.append(Band(reconstructions[row], "reconstruction", captions[row]))
    return bands


def labelled_grid(
    bands: Sequence[Band],
    columns: int,
    title: str = "",
    note: str = "",
    min_width: int = MIN_WIDTH,
) -> np.ndarray:
    """Arranges images in rows, with a title above, labels to the left and captions below images.

    Args:
        bands: The images, from the top; all have the same size.
        columns: Number of images in a row.
        title: The first line; default: none.
        note: A smaller line below the title; default: none.
        min_width: Smallest width of an image in pixels, to which smaller ones are enlarged.

    Returns:
        One 8-bit RGB image (height, width, 3). Without title, note and labels it has no margin either.
    """
    enlarged = [enlarge(band.images, min_width) for band in bands]
    height, width = enlarged[0].shape[1:3]
    labels_width = max(_text_size(band.label, TEXT_SIZE)[0] for band in bands)
    bare = not (title or note or labels_width)
    margin = 0 if bare else MARGIN
    left = margin + (labels_width + MARGIN if labels_width else 0)
    row_heights = [
        height + GAP + max(map(_captions_height, band.captions), default=0) for band in bands
    ]
    heading = [(title, TITLE_SIZE, INK), (note, TEXT_SIZE, GREY)]
    heading = [(text, size, colour) for text, size, colour in heading if text]
    top = margin + sum(_line_height(size) for _, size, _ in heading) + (8 if heading else 0)
    heights = [
        -(-len(images) // columns) * row - GAP
        for images, row in zip(enlarged, row_heights, strict=True)
    ]
    inside = columns * (width + GAP) - GAP
    widest = max([left + inside, *(margin + _text_size(t, size)[0] for t, size, _ in heading)])
    canvas = Image.new(
        "RGB",
        (widest + margin, top + sum(heights) + BAND_GAP * (len(bands) - 1) + margin),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)

    y = margin
    for text, size, colour in heading:
        draw.text((margin, y), text, colour, _font(size))
        y += _line_height(size)
    y = top
    for band, images, row, band_height in zip(bands, enlarged, row_heights, heights, strict=True):
        middle = (margin, y + (band_height - _text_size(band.label, TEXT_SIZE)[1]) // 2)
        draw.multiline_text(middle, band.label, INK, _font(TEXT_SIZE))
        for index, image in enumerate(images):
            corner = (left + index % columns * (width + GAP), y + index // columns * row)
            canvas.paste(Image.fromarray(image), corner)
            for line, text in enumerate(band.captions[index] if band.captions else ()):
                below = corner[1] + height + 2 + line * _line_height(CAPTION_SIZE)
                draw.text((corner[0], below), text, GREY, _font(CAPTION_SIZE))
        y += band_height + BAND_GAP
    return np.asarray(canvas)


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)


def _line_height(size: int) -> int:
    return size * 4 // 3


def _captions_height(lines: Sequence[str]) -> int:
    return len(lines) * _line_height(CAPTION_SIZE) + 4


def _text_size(text: str, size: int) -> tuple[int, int]:
    """Width and height in pixels of a text of any number of lines."""
    if not text:
        return 0, 0
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font=_font(size))
    return int(box[2]) + 1, int(box[3]) + 1

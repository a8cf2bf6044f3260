"""Grids of images."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between images
LEAST_WIDTH, LINE = 96, 12  # of an image with a caption, and of a line of its text


def to_bytes(images) -> np.ndarray:
    """Images in [0, 1] as 8-bit ones, values rounded."""
    return np.rint(np.clip(np.asarray(images), 0.0, 1.0) * 255.0).astype(np.uint8)


def grid(images, columns: int) -> np.ndarray:
    """Arranges images row by row, with a grey gap between them.

    Args:
        images: (n, height, width, channels) in [0, 1], or 8-bit.
        columns: images in a row.

    Returns:
        One 8-bit image (height', width', channels).
    """
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else to_bytes(images)
    _, height, width, channels = images.shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels)
    canvas = np.full(shape, 128, np.uint8)
    for index, image in enumerate(images):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def with_captions(images, captions: list[list[str]]) -> np.ndarray:
    """Puts lines of text below images, small ones enlarged to make room for them.

    Args:
        images: (n, height, width, 1 or 3) in [0, 1], or 8-bit.
        captions: as many lines for each image.

    Returns:
        8-bit images (n, height', width', 3).
    """
    drawn = []
    font = ImageFont.load_default()
    for image, lines in zip(images, captions, strict=True):
        enlarged = Image.fromarray(enlarge(image[None], LEAST_WIDTH)[0])
        canvas = Image.new("RGB", (enlarged.width, enlarged.height + LINE * len(lines)), "white")
        canvas.paste(enlarged)
        for number, line in enumerate(lines):
            place = (2, enlarged.height + LINE * number)
            ImageDraw.Draw(canvas).text(place, line, fill="black", font=font)
        drawn.append(np.asarray(canvas))
    return np.stack(drawn)


def enlarge(images, least_width: int) -> np.ndarray:
    """Repeats the pixels of small images until they are so wide; 8-bit RGB."""
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else to_bytes(images)
    times = -(-least_width // images.shape[2])
    images = images.repeat(times, 1).repeat(times, 2)
    return np.broadcast_to(images, (*images.shape[:3], 3))

"""Pictures of images with any number of channels and bits: 8-bit RGB, in grids and with captions."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 2  # pixels between images
MIN_WIDTH = 96  # pixels of an image with a caption
LINE_HEIGHT = 12  # pixels of a line of the caption


def to_bytes(images) -> np.ndarray:
    """Converts images in [0, 1] to 8 bits, rounding."""
    return np.rint(np.clip(np.asarray(images), 0.0, 1.0) * 255.0).astype(np.uint8)


def to_rgb(images) -> np.ndarray:
    """The one rule by which images become pictures to look at.

    One channel is grey. Of two, the first is magenta and the second green, so that equal values are
    grey. Three are red, green and blue; of four and more the first three are shown as those.

    Args:
        images: Images (..., height, width, channels) in [0, 1]; 8-bit ones stand for values / 255.

    Returns:
        8-bit RGB images (..., height, width, 3).
    """
    images = np.asarray(images)
    images = images if images.dtype == np.uint8 else to_bytes(images)
    if images.shape[-1] == 1:
        return images.repeat(3, -1)
    return images[..., [0, 1, 0]] if images.shape[-1] == 2 else images[..., :3]


def grid(images, columns: int) -> np.ndarray:
    """Arranges images row by row, with grey gaps between them.

    Args:
        images: Images (n, height, width, channels), as for `to_rgb`.
        columns: Number of images per row.

    Returns:
        One 8-bit RGB image (height', width', 3).
    """
    images = to_rgb(images)
    _, height, width, _ = images.shape
    rows = -(-len(images) // columns)
    shape = (rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3)
    canvas = np.full(shape, 128, np.uint8)
    for index, image in enumerate(images):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = image
    return canvas


def with_captions(images, captions: list[list[str]]) -> np.ndarray:
    """Puts lines of text below images; small images are enlarged to make room for the text.

    Args:
        images: Images (n, height, width, channels), as for `to_rgb`.
        captions: Lines of text for each image, as many for one as for another.

    Returns:
        8-bit images (n, height', width', 3).
    """
    captioned = []
    font = ImageFont.load_default()
    for image, lines in zip(images, captions, strict=True):
        enlarged = Image.fromarray(enlarge(image[None], MIN_WIDTH)[0])
        canvas = Image.new(
            "RGB", (enlarged.width, enlarged.height + LINE_HEIGHT * len(lines)), "white"
        )
        canvas.paste(enlarged)
        for row, line in enumerate(lines):
            position = (2, enlarged.height + LINE_HEIGHT * row)
            ImageDraw.Draw(canvas).text(position, line, fill="black", font=font)
        captioned.append(np.asarray(canvas))
    return np.stack(captioned)


def enlarge(images, min_width: int) -> np.ndarray:
    """Enlarges images by repeating their pixels a whole number of times.

    Args:
        images: Images (n, height, width, channels), as for `to_rgb`.
        min_width: Smallest width of the results in pixels.

    Returns:
        8-bit RGB images (n, height', width', 3).
    """
    images = to_rgb(images)
    times = -(-min_width // images.shape[2])
    return images.repeat(times, 1).repeat(times, 2)

"""How much the page shows."""

from typing import NamedTuple

TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
TEMPERATURE = 0.8  # of the film, the traversals and the samples whose neighbours are shown
START = 5  # index of the sample with which traversals begin
NUM_IMAGES = 400  # test images that are measured for the page, unless the user says how many
LARGEST_SMALL = 64 * 64  # pixels of an image; of larger ones less is shown


class Amounts(NamedTuple):
    """How much of each is shown: less of large images, which take longer and more bytes.

    Attributes:
        wall: Samples at each temperature.
        films: Films side by side.
        stations: Samples on the way of each film.
        frames: Images from one station to the next.
        interpolations: Pairs of test images with a way between them.
        steps: Images of an interpolation and of a traversal.
        reconstructed: Test images beside their reconstructions.
        traversed: Groups that are traversed, at most.
        influenced: Samples over which a group's influence is measured.
        queries: Samples whose neighbours are shown.
        extremes: The most and the least typical test images that are shown, of each.
    """

    wall: int = 144
    films: int = 12
    stations: int = 4
    frames: int = 10
    interpolations: int = 6
    steps: int = 9
    reconstructed: int = 18
    traversed: int = 12
    influenced: int = 100
    queries: int = 6
    extremes: int = 12


SMALL = Amounts()
LARGE = Amounts(
    wall=24,
    films=2,
    frames=8,
    interpolations=3,
    steps=7,
    reconstructed=6,
    traversed=8,
    influenced=8,
    queries=3,
    extremes=0,
)


def amounts_for(image) -> Amounts:
    """How much is shown of images.

    Args:
        image: Their `ImageSpec`.
    """
    return SMALL if image.height * image.width <= LARGEST_SMALL else LARGE

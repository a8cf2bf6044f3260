"""What a model has to know about images."""

import dataclasses
import math

from nvae_tf.config_keys import LARGEST_FLOAT, LARGEST_INT
from nvae_tf.io.errors import ConfigError, short_repr

MAX_CHANNELS, MAX_BITS = 16, 16  # of images
OFFICIAL_CHANNELS, OFFICIAL_BITS = 3, 8  # of images, at most, that the official likelihood is for


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """What the model has to know about images.

    Attributes:
        height: Height in pixels of the images that enter the model.
        width: Their width in pixels.
        channels: Number of channels, 1 to 16.
        bits: Bits per value of the images, 1 to 16: a value of 1 is level 2**bits - 1.
        binary: Whether pixels are 0 or 1 and scored under a Bernoulli distribution.
        scored_size: Height and width of the centre that the reconstruction term counts; None: the whole
            image. (Images of 28x28 are zero-padded to 32x32, and the padding is not scored.)
        value_range: The stored values that level 0 and the last level stand for, as Hounsfield units or
            counts of a detector; None: the levels themselves.

    Raises:
        ConfigError: A value is not allowed.
    """

    height: int
    width: int
    channels: int
    bits: int = 8
    binary: bool = False
    scored_size: tuple[int, int] | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self):
        for name in ("scored_size", "value_range"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        limits = {
            "height": LARGEST_INT,
            "width": LARGEST_INT,
            "channels": MAX_CHANNELS,
            "bits": MAX_BITS,
        }
        for name, largest in limits.items():
            value = getattr(self, name)
            if not _is_count(value) or value > largest:
                expected = "above 0" if largest == LARGEST_INT else f"from 1 to {largest}"
                raise ConfigError(
                    f"{name}: {short_repr(value)} is not allowed in an ImageSpec; expected a whole "
                    f"number {expected}"
                )
        if not isinstance(self.binary, bool):
            raise ConfigError(
                f"binary: {short_repr(self.binary)} is not allowed in an ImageSpec; expected True or "
                "False"
            )
        scored = (1, 1) if self.scored_size is None else self.scored_size
        is_pair = isinstance(scored, tuple) and len(scored) == 2 and all(map(_is_count, scored))
        if not is_pair or scored[0] > self.height or scored[1] > self.width:
            raise ConfigError(
                f"scored_size: {short_repr(scored)} is not allowed; expected the height and width of "
                f"a part of images of {self.height}x{self.width}"
            )
        if self.value_range is not None and not _is_interval(self.value_range):
            raise ConfigError(
                f"value_range: {short_repr(self.value_range)} is not allowed; expected the smallest "
                "and the largest value"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return (self.height, self.width, self.channels)

    @property
    def size_text(self) -> str:
        """Width x height as text, as users write it."""
        return f"{self.width}x{self.height}"

    @property
    def scored_part(self) -> tuple[slice, slice]:
        """The rows and the columns that are scored."""
        inner_height, inner_width = self.scored_size or (self.height, self.width)
        top, left = (self.height - inner_height) // 2, (self.width - inner_width) // 2
        return slice(top, top + inner_height), slice(left, left + inner_width)

    @property
    def num_dims(self) -> int:
        """Number of scored values per image: the divisor of bits per dimension."""
        return math.prod(self.scored_size or (self.height, self.width)) * self.channels

    def bits_per_dim(self, nats):
        """Converts nats per image to bits per dimension (elementwise)."""
        return nats / (math.log(2.0) * self.num_dims)


def image_spec(
    image: ImageSpec | tuple[int, int, int] | None, binary: bool | None = None
) -> ImageSpec:
    """Images as a model takes them.

    Args:
        image: An `ImageSpec`, or height, width and channels.
        binary: Whether pixels are 0 or 1; default: what an `ImageSpec` says, or False.

    Raises:
        ConfigError: It is neither, or a value is not allowed.
    """
    if isinstance(image, ImageSpec):
        if binary not in (None, image.binary):
            raise ConfigError(
                f"binary: {short_repr(binary)} is not allowed beside an ImageSpec that says "
                f"{image.binary}"
            )
        return image
    if isinstance(image, (tuple, list)) and len(image) == 3:
        return ImageSpec(*image, binary=False if binary is None else binary)
    raise ConfigError(
        f"image: {short_repr(image)} is not allowed; expected (height, width, channels) or an ImageSpec"
    )


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_interval(value) -> bool:
    """Whether a value is a pair of finite numbers in rising order."""
    is_pair = isinstance(value, tuple) and len(value) == 2
    if not is_pair or not all(isinstance(end, (int, float)) for end in value):
        return False
    return -LARGEST_FLOAT <= value[0] < value[1] <= LARGEST_FLOAT

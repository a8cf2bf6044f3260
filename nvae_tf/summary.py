"""The table that `NVAE.summary` prints: the model's parts in the order in which images pass them."""

from collections.abc import Iterator
from typing import NamedTuple

from nvae_tf.config import ModelConfig
from nvae_tf.layers.cells import DOWN, NORMAL, UP
from nvae_tf.layers.latent_group import LatentGroup


class Part(NamedTuple):
    """A row of the table.

    Attributes:
        name: ``"encoder scale 0 group 1"``, for example.
        output_shape: Shape of the map that it returns, (height, width, channels).
        parameters: Number of its weights, running averages of batch norms included.
    """

    name: str
    output_shape: tuple[int, int, int]
    parameters: int


def parts(model) -> Iterator[Part]:
    """The parts of a model.

    Scales and groups are numbered from the coarsest, as in ``kl_per_group``: group 0 is the top of the
    hierarchy. A row holds all cells of the encoder or the decoder that belong to a group.

    Args:
        model: An `NVAE`.
    """
    height, width, _ = model.image.shape
    scales = _scale_of_each_group(model.config)

    def part(name, layers):
        nonlocal height, width
        for layer in layers:
            direction = getattr(layer, "direction", NORMAL)
            if direction == DOWN:
                height, width = height // 2, width // 2
            elif direction == UP:
                height, width = 2 * height, 2 * width
        last = layers[-1]
        channels = last.filters_dec if isinstance(last, LatentGroup) else last.filters
        shape = (height, width, channels)
        return Part(name, shape, sum(layer.count_params() for layer in layers))

    yield part("stem", [model.stem])
    for number, cell in enumerate(model.preprocess):
        yield part(f"preprocess cell {number}", [cell])
    for number, cells in enumerate(model.encoder_tower):
        group = len(model.groups) - 1 - number
        yield part(f"encoder scale {scales[group]} group {group}", cells)
    yield part("encoder top", [model.encoder_top])
    if model.top is not None:
        yield Part("decoder top", model.top_shape, model.top.shape.num_elements())
    group = 0
    for layer in model.decoder_tower:
        if isinstance(layer, LatentGroup):
            yield part(f"decoder scale {scales[group]} group {group}", [layer])
            group += 1
        else:
            yield part(f"decoder up to scale {scales[group]}", [layer])
    for number, cell in enumerate(model.postprocess):
        yield part(f"postprocess cell {number}", [cell])
    yield part("image head", [model.image_head])


def _scale_of_each_group(config: ModelConfig) -> list[int]:
    counts = reversed(config.groups_per_scale)
    return [scale for scale, count in enumerate(counts) for _ in range(count)]


def summary_lines(model) -> list[str]:
    """The lines of the table.

    Args:
        model: An `NVAE`.
    """
    rows = [("Part", "Output shape", "Parameters")]
    rows += [
        (
            part.name,
            "(None, " + ", ".join(map(str, part.output_shape)) + ")",
            f"{part.parameters:,}",
        )
        for part in parts(model)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    rule = "=" * len(table[0])
    trained = model.num_parameters
    others = sum(v.shape.num_elements() for v in model.non_trainable_variables)
    return [
        repr(model),
        rule,
        table[0],
        rule,
        *table[1:],
        rule,
        f"Parameters: {trained:,}; running averages of batch norms: {others:,}",
    ]

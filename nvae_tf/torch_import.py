"""Import of official weights: a table from the keys of the official ``state_dict`` to our weights.

This is the only file that knows the official names.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf.config import KEYS, Config, ModelConfig, from_dict
from nvae_tf.config_keys import LARGEST_INT
from nvae_tf.engine.weights import Weight, assign_all
from nvae_tf.io import torch_file
from nvae_tf.io.errors import UserError
from nvae_tf.layers.batch_norm import BatchNormAct
from nvae_tf.layers.cells import MBConv, NormActConv, ResidualCell, SkipDown
from nvae_tf.layers.convolution import Conv2D
from nvae_tf.model import NVAE, LatentGroup


class OfficialCheckpoint(NamedTuple):
    """The content of an official checkpoint.

    Attributes:
        state: The ``state_dict``: arrays in the official layout, by official key.
        config: The configuration that it was trained with.
        step: Number of training steps that it took.
    """

    state: dict[str, np.ndarray]
    config: Config
    step: int


class Entry(NamedTuple):
    """One of our weights, and its conversion from and to the official layout.

    Attributes:
        weight: Our weight.
        to_ours: Function from the official array to ours.
        to_official: The inverse function.
    """

    weight: Weight
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


def read(path: Path) -> OfficialCheckpoint:
    """Reads an official checkpoint, without PyTorch and without running any code in it.

    Args:
        path: Path of the ``.pt`` file.

    Raises:
        UserError: The file is missing or damaged, is not a checkpoint of NVAE, or needs code to be run.
    """
    content = torch_file.load(path)
    state, flags = content.get("state_dict"), content.get("args")
    if not isinstance(state, dict) or not isinstance(flags, dict):
        raise UserError(f"{path}: not a checkpoint of NVAE: it has no state_dict or no args")
    arrays = torch_file.arrays(state, path)
    try:
        values = {key: value for key, value in flags.items() if key in KEYS and key != "data"}
        config = from_dict({key: value for key, value in values.items() if value is not None})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    step = content.get("global_step")
    step = step if isinstance(step, int) and 0 <= step <= LARGEST_INT else 0
    return OfficialCheckpoint(arrays, config, step)


def model_config(flags: dict) -> ModelConfig:
    """The model's configuration for official flags.

    Args:
        flags: Values of official flags by name. Flags that do not concern the model are ignored. Old
            files may lack ``ada_groups``, ``min_groups_per_scale`` and ``num_mixture_dec``: these take
            their defaults.
    """
    names = [name for name in ModelConfig.__dataclass_fields__ if name in flags]
    return from_dict({name: flags[name] for name in names}).model


def official_entries(model: NVAE) -> dict[str, Entry]:
    """Every weight of the model, by its key in the official ``state_dict`` (see `canonical_key`)."""
    entries = {}
    for name, layer in official_modules(model).items():
        if isinstance(layer, Conv2D):
            entries[f"{name}.weight"] = Entry(layer.kernel, _from_oihw, _to_oihw)
            if layer.weight_norm:
                entries[f"{name}.log_weight_norm"] = Entry(
                    layer.log_norm, np.ravel, lambda a: np.reshape(a, (-1, 1, 1, 1))
                )
            if layer.use_bias:
                entries[f"{name}.bias"] = _unchanged(layer.bias)
        elif isinstance(layer, BatchNormAct):
            entries[f"{name}.weight"] = _unchanged(layer.gamma)
            entries[f"{name}.bias"] = _unchanged(layer.beta)
            entries[f"{name}.running_mean"] = _unchanged(layer.moving_mean)
            entries[f"{name}.running_var"] = _unchanged(layer.moving_variance)
        else:  # squeeze-and-excitation
            entries[f"{name}.0.weight"] = Entry(layer.reduce_kernel, np.transpose, np.transpose)
            entries[f"{name}.0.bias"] = _unchanged(layer.reduce_bias)
            entries[f"{name}.2.weight"] = Entry(layer.expand_kernel, np.transpose, np.transpose)
            entries[f"{name}.2.bias"] = _unchanged(layer.expand_bias)
    if model.top is not None:
        entries["prior_ftr0"] = Entry(
            model.top, lambda a: np.transpose(a, (1, 2, 0)), lambda a: np.transpose(a, (2, 0, 1))
        )
    return entries


def load_state(model: NVAE, state: dict) -> None:
    """Assigns an official ``state_dict`` to the model's weights.

    Args:
        model: A model with the configuration of the official one.
        state: Arrays in the official layout, by official key.

    Raises:
        UserError: An array is missing, left over or of the wrong shape. Nothing is assigned then.
    """
    entries = official_entries(model)
    names = {}  # from canonical keys to those of the file
    for key in state:
        if not is_ignored(key):
            other = names.setdefault(canonical_key(key), key)
            if other != key:
                raise UserError(f"the official weights do not fit: {other} and {key} are one array")
    if len(model.groups) == 1:
        names.pop("prior_ftr0", None)  # official files hold it, but a single group does not use it
    for problem, keys in (
        ("missing", entries.keys() - names.keys()),
        ("left over", [names[key] for key in names.keys() - entries.keys()]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"the official weights do not fit: {min(keys)}{more} {problem}")
    arrays = {key: np.asarray(state[name]) for key, name in names.items()}
    for key, array in arrays.items():
        expected = entries[key].to_official(np.empty(tuple(entries[key].weight.shape))).shape
        if array.shape != expected:
            raise UserError(
                f"the official weights do not fit: {names[key]} has shape {array.shape}, not "
                f"{expected}"
            )
    assign_all({entries[key].weight: entries[key].to_ours(array) for key, array in arrays.items()})


def canonical_key(key: str) -> str:
    """The key in `official_entries` for a key of a ``state_dict``.

    Files have several names for the batch norm of a ``res_*`` operation: ``bn_act`` with swish, and
    with ELU ``bn.bn``, since a wrapper holds it, or ``bn``. In `official_entries` it is ``bn_act``.
    """
    return re.sub(r"(_ops\.\d+)\.bn(\.bn)?\.", r"\1.bn_act.", key)


def is_ignored(key: str) -> bool:
    """Whether an entry of a ``state_dict`` is not a weight, and so is not loaded."""
    return key.endswith(("weight_normalized", "num_batches_tracked"))


def official_modules(model: NVAE) -> dict:
    """Every layer that has weights besides those of its sublayers, by its module's official name."""
    modules = {"stem": model.stem}
    for index, cell in enumerate(model.preprocess):
        modules.update(_cell_modules(f"pre_process.{index}", cell))

    # Encoder cells and combiners share one numbering. The group that is encoded first is decoded last.
    cell_index = 0
    for cells, group in zip(model.encoder_tower, reversed(model.groups), strict=True):
        for cell in cells:
            modules.update(_cell_modules(f"enc_tower.{cell_index}", cell))
            cell_index += 1
        if group.encoder_combiner is not None:
            modules[f"enc_tower.{cell_index}.conv"] = group.encoder_combiner
            cell_index += 1
    modules["enc0.1"] = model.encoder_top

    cell_index = flow_index = 0
    for layer in model.decoder_tower:
        for cell in layer.cells if isinstance(layer, LatentGroup) else [layer]:
            modules.update(_cell_modules(f"dec_tower.{cell_index}", cell))
            cell_index += 1
        if not isinstance(layer, LatentGroup):
            continue
        group_index = model.groups.index(layer)
        modules[f"enc_sampler.{group_index}"] = layer.posterior_sampler
        if layer.prior_sampler is not None:
            modules[f"dec_sampler.{group_index - 1}.1"] = layer.prior_sampler
        for flow in layer.flows:
            for cell_name, shift in zip(("cell1", "cell2"), flow.shifts, strict=True):
                prefix = f"nf_cells.{flow_index}.{cell_name}"
                names = ("conv.convz.0", "conv.convz.2", "mu.conv_0")
                for name, convolution in zip(names, shift.convolutions, strict=True):
                    modules[f"{prefix}.{name}"] = convolution
            flow_index += 1
        if len(model.groups) > 1:
            modules[f"dec_tower.{cell_index}.conv"] = layer.combiner
            cell_index += 1
        else:
            modules["stem_decoder"] = layer.combiner

    for index, cell in enumerate(model.postprocess):
        modules.update(_cell_modules(f"post_process.{index}", cell))
    modules["image_conditional.1"] = model.image_head
    return modules


def singular_vector(vector: np.ndarray, kernel_shape) -> np.ndarray:
    """Reorders an official right singular vector from (in, k, k) to our (k, k, in).

    Args:
        vector: The official vector, (in * k * k,).
        kernel_shape: Shape of the kernel, (k, k, in, out).

    Returns:
        The vector in our order, (k * k * in,).
    """
    size, _, inputs, _ = kernel_shape
    return np.transpose(vector.reshape(inputs, size, size), (1, 2, 0)).ravel()


def _cell_modules(prefix: str, cell: ResidualCell) -> dict:
    modules = {}
    for index, operation in enumerate(cell.branch):
        name = f"{prefix}._ops.{index}"
        if isinstance(operation, MBConv):
            modules.update(_mbconv_modules(f"{name}.conv", operation))
        elif isinstance(operation, NormActConv):
            if operation.norm is not None:
                modules[f"{name}.bn_act"] = operation.norm
            modules[f"{name}.conv_0"] = operation.convolution
    if isinstance(cell.skip, SkipDown):
        for index, convolution in enumerate(cell.skip.convolutions, 1):
            modules[f"{prefix}.skip.conv_{index}"] = convolution
    elif cell.skip is not None:
        modules[f"{prefix}.skip.1"] = cell.skip.convolution
    if cell.se is not None:
        modules[f"{prefix}.se.se"] = cell.se
    return modules


def _mbconv_modules(prefix: str, operation: MBConv) -> dict:
    # The doubling of an up cell is a separate official module, with index 0.
    start = 1 if operation.direction == "up" else 0
    expand, middle, project = operation.convolutions
    norms = operation.norms
    return {
        f"{prefix}.{start}.bn": norms[0],
        f"{prefix}.{start + 1}.conv.0": expand,
        f"{prefix}.{start + 1}.conv.1": norms[1],
        f"{prefix}.{start + 2}.conv.0": middle,
        f"{prefix}.{start + 2}.conv.1": norms[2],
        f"{prefix}.{start + 3}": project,
        f"{prefix}.{start + 4}.bn": norms[3],
    }


def _from_oihw(kernel):
    return np.transpose(kernel, (2, 3, 1, 0))


def _to_oihw(kernel):
    return np.transpose(kernel, (3, 2, 0, 1))


def _unchanged(weight):
    return Entry(weight, np.asarray, np.asarray)

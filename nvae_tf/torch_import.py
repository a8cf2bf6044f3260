"""Weights of the official implementation: a table from the keys of its ``state_dict`` to ours.

This is the only file that knows the official names.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf.config import KEYS, LARGEST_INT, Config, ModelConfig, from_dict
from nvae_tf.engine.weights import Weight, assign_all
from nvae_tf.io import torch_file
from nvae_tf.io.errors import UserError
from nvae_tf.layers.batch_norm import BatchNormAct
from nvae_tf.layers.cells import MBConv, NormActConv, ResidualCell, SkipDown
from nvae_tf.layers.convolution import Conv2D
from nvae_tf.model import NVAE, LatentGroup


class Official(NamedTuple):
    """What an official checkpoint holds.

    Attributes:
        state: the ``state_dict``, arrays by official key.
        config: the flags that it was trained with.
        step: training steps that it took.
    """

    state: dict[str, np.ndarray]
    config: Config
    step: int


class Entry(NamedTuple):
    """One of our weights under its official name.

    Attributes:
        weight: Ours.
        to_ours: turns the official array into ours.
        to_official: the inverse.
    """

    weight: Weight
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_official: Callable[[np.ndarray], np.ndarray]


def read(path: Path) -> Official:
    """Reads an official checkpoint, without PyTorch, and without running any code in it.

    Raises:
        UserError: it is missing, damaged, no checkpoint of NVAE, or asks for code.
    """
    content = torch_file.load(path)
    state, flags = content.get("state_dict"), content.get("args")
    if not isinstance(state, dict) or not isinstance(flags, dict):
        raise UserError(f"{path}: not a checkpoint of NVAE: holds no state_dict and args")
    arrays = torch_file.arrays(state, path)
    try:
        known = {key: value for key, value in flags.items() if key in KEYS and key != "data"}
        config = from_dict({key: value for key, value in known.items() if value is not None})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    step = content.get("global_step")
    steps = step if isinstance(step, int) and 0 <= step <= LARGEST_INT else 0
    return Official(arrays, config, steps)


def model_config(flags: dict) -> ModelConfig:
    """The configuration in official flags; those that do not concern the model are ignored.

    Old files may lack ``ada_groups``, ``min_groups_per_scale`` and ``num_mixture_dec``, whose
    defaults hold then.
    """
    known = {f for f in ModelConfig.__dataclass_fields__ if f in flags}
    return from_dict({name: flags[name] for name in known}).model


def official_entries(model: NVAE) -> dict[str, Entry]:
    """Every weight of the model by its key in the official ``state_dict``, see `canonical_key`."""
    entries = {}
    for name, layer in official_modules(model).items():
        if isinstance(layer, Conv2D):
            entries[f"{name}.weight"] = Entry(layer.kernel, _from_oihw, _to_oihw)
            if layer.weight_norm:
                entries[f"{name}.log_weight_norm"] = Entry(
                    layer.log_norm, np.ravel, lambda a: np.reshape(a, (-1, 1, 1, 1))
                )
            if layer.use_bias:
                entries[f"{name}.bias"] = _as_is(layer.bias)
        elif isinstance(layer, BatchNormAct):
            entries[f"{name}.weight"] = _as_is(layer.gamma)
            entries[f"{name}.bias"] = _as_is(layer.beta)
            entries[f"{name}.running_mean"] = _as_is(layer.moving_mean)
            entries[f"{name}.running_var"] = _as_is(layer.moving_variance)
        else:  # squeeze-and-excitation
            entries[f"{name}.0.weight"] = Entry(layer.reduce_kernel, np.transpose, np.transpose)
            entries[f"{name}.0.bias"] = _as_is(layer.reduce_bias)
            entries[f"{name}.2.weight"] = Entry(layer.expand_kernel, np.transpose, np.transpose)
            entries[f"{name}.2.bias"] = _as_is(layer.expand_bias)
    if model.top is not None:
        entries["prior_ftr0"] = Entry(
            model.top, lambda a: np.transpose(a, (1, 2, 0)), lambda a: np.transpose(a, (2, 0, 1))
        )
    return entries


def load_state(model: NVAE, state: dict) -> None:
    """Assigns an official ``state_dict`` to the model's weights.

    Args:
        model: built from the same configuration.
        state: arrays in the official layout, by official key.

    Raises:
        UserError: an array is missing, left over or of the wrong shape; nothing is assigned then.
    """
    entries = official_entries(model)
    names = {}  # canonical key -> the file's
    for key in state:
        if not is_ignored(key):
            other = names.setdefault(canonical_key(key), key)
            if other != key:
                raise UserError(f"the official weights do not fit: {other} and {key} are one array")
    if len(model.groups) == 1:
        names.pop("prior_ftr0", None)  # kept in official files, used by nothing
    for problem, keys in (
        ("missing", entries.keys() - names.keys()),
        ("left over", [names[key] for key in names.keys() - entries.keys()]),
    ):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise UserError(f"the official weights do not fit: {min(keys)}{more} {problem}")
    found = {key: np.asarray(state[name]) for key, name in names.items()}
    for key, array in found.items():
        expected = entries[key].to_official(np.empty(tuple(entries[key].weight.shape))).shape
        if array.shape != expected:
            raise UserError(
                f"the official weights do not fit: {names[key]} has shape {array.shape}, not "
                f"{expected}"
            )
    assign_all({entries[key].weight: entries[key].to_ours(a) for key, a in found.items()})


def canonical_key(key: str) -> str:
    """The key of `official_entries` for a key of a ``state_dict``.

    Files have several names for the batch norm of a ``res_*`` operation: ``bn_act`` with swish,
    ``bn.bn`` with ELU, where a wrapper holds it, or ``bn`` alone. Here it is ``bn_act``.
    """
    return re.sub(r"(_ops\.\d+)\.bn(\.bn)?\.", r"\1.bn_act.", key)


def is_ignored(key: str) -> bool:
    """Whether an entry of a ``state_dict`` holds nothing to load."""
    return key.endswith(("weight_normalized", "num_batches_tracked"))


def official_modules(model: NVAE) -> dict:
    """Every layer with weights of its own, by the official name of its module."""
    modules = {"stem": model.stem}
    for index, cell in enumerate(model.preprocess):
        modules.update(_cell_modules(f"pre_process.{index}", cell))

    # Encoder cells and combiners share one numbering; the group encoded first decodes last.
    number = 0
    for cells, group in zip(model.encoder_tower, reversed(model.groups), strict=True):
        for cell in cells:
            modules.update(_cell_modules(f"enc_tower.{number}", cell))
            number += 1
        if group.encoder_combiner is not None:
            modules[f"enc_tower.{number}.conv"] = group.encoder_combiner
            number += 1
    modules["enc0.1"] = model.encoder_top

    number = flow_number = 0
    for layer in model.decoder_tower:
        for cell in layer.cells if isinstance(layer, LatentGroup) else [layer]:
            modules.update(_cell_modules(f"dec_tower.{number}", cell))
            number += 1
        if not isinstance(layer, LatentGroup):
            continue
        index = model.groups.index(layer)
        modules[f"enc_sampler.{index}"] = layer.posterior_sampler
        if layer.prior_sampler is not None:
            modules[f"dec_sampler.{index - 1}.1"] = layer.prior_sampler
        for flow in layer.flows:
            for cell_name, shift in zip(("cell1", "cell2"), flow.shifts, strict=True):
                prefix = f"nf_cells.{flow_number}.{cell_name}"
                names = ("conv.convz.0", "conv.convz.2", "mu.conv_0")
                for name, convolution in zip(names, shift.convolutions, strict=True):
                    modules[f"{prefix}.{name}"] = convolution
            flow_number += 1
        if len(model.groups) > 1:
            modules[f"dec_tower.{number}.conv"] = layer.combiner
            number += 1
        else:
            modules["stem_decoder"] = layer.combiner

    for index, cell in enumerate(model.postprocess):
        modules.update(_cell_modules(f"post_process.{index}", cell))
    modules["image_conditional.1"] = model.image_head
    return modules


def singular_vector(vector: np.ndarray, kernel_shape) -> np.ndarray:
    """An official right singular vector, (in, k, k) flattened, in our order (k, k, in)."""
    size, _, inputs, _ = kernel_shape
    return np.transpose(vector.reshape(inputs, size, size), (1, 2, 0)).ravel()


def _cell_modules(prefix: str, cell: ResidualCell) -> dict:
    modules = {}
    for index, operation in enumerate(cell.branch):
        name = f"{prefix}._ops.{index}"
        if isinstance(operation, MBConv):
            modules.update(_inverted_residual_modules(f"{name}.conv", operation))
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


def _inverted_residual_modules(prefix: str, operation: MBConv) -> dict:
    # An up cell's doubling is a module of its own and takes number 0.
    at = 1 if operation.direction == "up" else 0
    expand, middle, project = operation.convolutions
    norms = operation.norms
    return {
        f"{prefix}.{at}.bn": norms[0],
        f"{prefix}.{at + 1}.conv.0": expand,
        f"{prefix}.{at + 1}.conv.1": norms[1],
        f"{prefix}.{at + 2}.conv.0": middle,
        f"{prefix}.{at + 2}.conv.1": norms[2],
        f"{prefix}.{at + 3}": project,
        f"{prefix}.{at + 4}.bn": norms[3],
    }


def _from_oihw(kernel):
    return np.transpose(kernel, (2, 3, 1, 0))


def _to_oihw(kernel):
    return np.transpose(kernel, (3, 2, 0, 1))


def _as_is(weight):
    return Entry(weight, np.asarray, np.asarray)

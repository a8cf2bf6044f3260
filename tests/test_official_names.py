"""Official checkpoints of every architecture, whose names are written down here once more.

They follow from the specification's rules, not from the importer's table. The reference files, written
by the official implementation, show that the rules are right.
"""

import argparse
import collections
import dataclasses
import json

import numpy as np
import pytest
from test_torch_file import FILES, Rebuilt, Storage, torch_names, write_zip  # noqa: F401

from nvae_tf import torch_import
from nvae_tf.architectures import ARCHITECTURES
from nvae_tf.config import ModelConfig
from nvae_tf.engine.weights import weights_below
from nvae_tf.evaluation import loading
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError
from nvae_tf.model import NVAE

SMALL = ModelConfig(
    num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3, num_channels_enc=16,
    num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=2,
    num_postprocess_cells=2, num_cell_per_cond_enc=2, num_mixture_dec=2, num_nf=1,
)  # fmt: skip
COLOUR = ImageSpec(32, 32, 3)

# What the branches hold: of preprocess and encoder cells, of decoder cells, of postprocess cells.
BRANCHES = {
    "res_mbconv": ("bnswish bnswish", "bnswish bnswish", "e6k5g0", "e3k5g0"),
    "res_elu": ("elu elu",) * 4,
    "res_bnelu": ("bnelu bnelu",) * 4,
    "res_bnswish": ("bnswish bnswish",) * 4,
    "mbconv_sep": ("e3k5g0", "e6k5g0", "e6k5g0", "e3k5g0"),
    "mbconv_sep11": ("e3k5g0", "e6k11g0", "e6k11g0", "e3k5g0"),
    "res53_mbconv": ("bnswish5 bnswish", "bnswish5 bnswish", "e6k5g0", "e3k5g0"),
    "res35_mbconv": ("bnswish bnswish5", "bnswish bnswish5", "e6k5g0", "e3k5g0"),
    "res55_mbconv": ("bnswish5 bnswish5", "bnswish5 bnswish5", "e6k5g0", "e3k5g0"),
    "mbconv_res": ("e3k5g0", "e6k5g0", "bnswish bnswish", "bnswish bnswish"),
    "mbconv_den": ("e3k5g8", "e6k5g0", "e6k5g0", "e3k5g8"),
}

# Names that a res_* operation's batch norm goes by; None: the rule's.
SPELLINGS = (None, "bn_act", "bn.bn", "bn")


class Layout:
    """Key, shape and our variable of every array in an official ``state_dict``.

    Args:
        model: ours; its configuration says what there is.
        spelling: of the batch norms of ``res_*`` operations.
    """

    def __init__(self, model, spelling=None):
        self.arrays = {}  # key -> (official shape, our variable)
        self.model, self.config, self.spelling = model, model.config, spelling
        self.add_decoder(*self.add_encoder())

    def add_encoder(self):
        """Returns the width of every group's encoder map, and the coarsest of the decoder."""
        model, config = self.model, self.config
        preprocess, encoder, _, _ = BRANCHES[config.arch_instance]
        width = config.num_channels_enc
        self.conv("stem", model.stem, model.image.channels, width, 3)
        ours, number = iter(model.preprocess), 0
        for _ in range(config.num_preprocess_blocks):
            for _ in range(config.num_preprocess_cells - 1):
                self.cell(f"pre_process.{number}", next(ours), preprocess, width, width)
                number += 1
            self.cell(f"pre_process.{number}", next(ours), preprocess, width, 2 * width, "down")
            width, number = 2 * width, number + 1

        # The encoder's group number n from the bottom is the decoder's from the top.
        widths, number = [], 0
        ours = (cell for cells in model.encoder_tower for cell in cells)
        scales = config.groups_per_scale
        for scale, count in enumerate(scales):
            width_dec = config.num_channels_dec * width // config.num_channels_enc
            for _ in range(count):
                for _ in range(config.num_cell_per_cond_enc):
                    self.cell(f"enc_tower.{number}", next(ours), encoder, width, width)
                    number += 1
                widths.insert(0, width)
                if len(widths) < len(model.groups):
                    combiner = model.groups[-len(widths)].encoder_combiner
                    self.conv(f"enc_tower.{number}.conv", combiner, width_dec, width, 1)
                    number += 1
            if scale + 1 < len(scales):
                self.cell(f"enc_tower.{number}", next(ours), encoder, width, 2 * width, "down")
                width, number = 2 * width, number + 1
        self.conv("enc0.1", model.encoder_top, width, width, 1)
        return widths, width_dec

    def add_decoder(self, widths_enc, width):
        model, config = self.model, self.config
        _, _, decoder, postprocess = BRANCHES[config.arch_instance]
        latents, alone = config.num_latent_per_group, len(model.groups) == 1
        if not alone:
            size = model.latent_shapes[0][0]
            self.add("prior_ftr0", (width, size, size), model.top)
        ours = [cell for layer in model.decoder_tower for cell in getattr(layer, "cells", [layer])]
        ours, number, index = iter(ours), 0, 0
        for scale, count in enumerate(reversed(config.groups_per_scale)):
            if scale > 0:
                self.cell(f"dec_tower.{number}", next(ours), decoder, width, width // 2, "up")
                width, number = width // 2, number + 1
            for _ in range(count):
                group = model.groups[index]
                if index > 0:
                    for _ in range(config.num_cell_per_cond_dec):
                        self.cell(f"dec_tower.{number}", next(ours), decoder, width, width)
                        number += 1
                    prior = f"dec_sampler.{index - 1}.1"
                    self.conv(prior, group.prior_sampler, width, 2 * latents, 1)
                posterior = f"enc_sampler.{index}"
                self.conv(posterior, group.posterior_sampler, widths_enc[index], 2 * latents, 3)
                for flow in range(config.num_nf):
                    self.flow(index * config.num_nf + flow, group.flows[flow], latents)
                combiner = "stem_decoder" if alone else f"dec_tower.{number}.conv"
                self.conv(combiner, group.combiner, latents + (0 if alone else width), width, 1)
                index, number = index + 1, number + 1

        ours, number = iter(model.postprocess), 0
        for _ in range(config.num_postprocess_blocks):
            self.cell(f"post_process.{number}", next(ours), postprocess, width, width // 2, "up")
            width, number = width // 2, number + 1
            for _ in range(config.num_postprocess_cells - 1):
                self.cell(f"post_process.{number}", next(ours), postprocess, width, width)
                number += 1
        channels, mixtures = model.image.channels, config.num_mixture_dec
        outputs = 2 * channels if mixtures == 1 else 10 * mixtures
        outputs = channels if model.image.binary else outputs
        self.conv("image_conditional.1", model.image_head, width, outputs, 3)

    def add(self, key, shape, variable):
        assert key not in self.arrays
        self.arrays[key] = (shape, variable)

    def conv(self, name, ours, inputs, outputs, size, groups=1, bias=True, norm=True):
        self.add(f"{name}.weight", (outputs, inputs // groups, size, size), ours.kernel)
        if norm:
            self.add(f"{name}.log_weight_norm", (outputs, 1, 1, 1), ours.log_norm)
        if bias:
            self.add(f"{name}.bias", (outputs,), ours.bias)

    def norm(self, name, ours, channels):
        self.add(f"{name}.weight", (channels,), ours.gamma)
        self.add(f"{name}.bias", (channels,), ours.beta)
        self.add(f"{name}.running_mean", (channels,), ours.moving_mean)
        self.add(f"{name}.running_var", (channels,), ours.moving_variance)

    def cell(self, name, ours, branch, inputs, outputs, direction="normal"):
        width, at = inputs, direction
        for index, operation in enumerate(branch.split()):
            prefix, layer = f"{name}._ops.{index}", ours.branch[index]
            if operation.endswith(("g0", "g8")):
                self.inverted(f"{prefix}.conv", layer, operation, width, outputs, at)
            else:
                if operation != "elu":
                    norm_name = {"bnelu": "bn.bn"}.get(operation, "bn_act")
                    self.norm(f"{prefix}.{self.spelling or norm_name}", layer.norm, width)
                self.conv(f"{prefix}.conv_0", layer.convolution, width, outputs, 3)
            width, at = outputs, "normal"
        if direction == "down":
            quarter = outputs // 4
            for part, layer in enumerate(ours.skip.convolutions):
                self.conv(f"{name}.skip.conv_{part + 1}", layer, inputs, quarter, 1)
        if direction == "up":
            self.conv(f"{name}.skip.1", ours.skip.convolution, inputs, outputs, 1, bias=False)
        if self.config.use_se:
            hidden, se = max(outputs // 16, 4), ours.se
            self.add(f"{name}.se.se.0.weight", (hidden, outputs), se.reduce_kernel)
            self.add(f"{name}.se.se.0.bias", (hidden,), se.reduce_bias)
            self.add(f"{name}.se.se.2.weight", (outputs, hidden), se.expand_kernel)
            self.add(f"{name}.se.se.2.bias", (outputs,), se.expand_bias)

    def inverted(self, name, ours, operation, inputs, outputs, direction):
        expansion, rest = operation[1:].split("k")
        size, groups = map(int, rest.split("g"))
        hidden, at = int(expansion) * inputs, 1 if direction == "up" else 0
        plain = dict(bias=False, norm=False)
        expand, middle, project = ours.convolutions
        self.norm(f"{name}.{at}.bn", ours.norms[0], inputs)
        self.conv(f"{name}.{at + 1}.conv.0", expand, inputs, hidden, 1, **plain)
        self.norm(f"{name}.{at + 1}.conv.1", ours.norms[1], hidden)
        groups = groups or hidden
        self.conv(f"{name}.{at + 2}.conv.0", middle, hidden, hidden, size, groups, **plain)
        self.norm(f"{name}.{at + 2}.conv.1", ours.norms[2], hidden)
        self.conv(f"{name}.{at + 3}", project, hidden, outputs, 1, **plain)
        self.norm(f"{name}.{at + 4}.bn", ours.norms[3], outputs)

    def flow(self, index, ours, latents):
        hidden = 6 * latents
        for cell, shift in zip(("cell1", "cell2"), ours.shifts, strict=True):
            name = f"nf_cells.{index}.{cell}"
            widen, spread, project = shift.convolutions
            self.conv(f"{name}.conv.convz.0", widen, latents, hidden, 3, bias=False)
            self.conv(f"{name}.conv.convz.2", spread, hidden, hidden, 5, hidden, bias=False)
            self.conv(f"{name}.mu.conv_0", project, hidden, latents, 1)

    def draw(self, seed):
        """A ``state_dict`` of random numbers, and of entries that hold nothing to load."""
        rng = np.random.default_rng(seed)
        state = {}
        for key, (shape, _) in self.arrays.items():
            state[key] = rng.normal(size=shape).astype(np.float32)
            if key.endswith("running_var"):
                state[key.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
        return state

    def assert_holds(self, state):
        """Every variable has its own array's numbers, in our order of the axes."""
        for key, (shape, variable) in self.arrays.items():
            expected = state[key]
            if key == "prior_ftr0":
                expected = expected.transpose(1, 2, 0)  # (channels, height, width)
            elif key.endswith("log_weight_norm"):
                expected = expected[:, 0, 0, 0]
            elif len(shape) == 4:
                expected = expected.transpose(2, 3, 1, 0)  # (out, in, height, width)
            elif len(shape) == 2:
                expected = expected.T  # (out, in)
            np.testing.assert_array_equal(variable.numpy(), expected, err_msg=key)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_rules_are_those_of_the_reference_files(path):
    with np.load(path.with_suffix(".npz")) as archive:
        flags = json.loads(str(archive["config"]))
        shapes = {key[6:]: archive[key].shape for key in archive.files if key.startswith("state/")}
        size = archive["x"].shape[2]
    config = torch_import.model_config(flags)
    binary = flags["dataset"] == "mnist"
    model = NVAE(config, ImageSpec(size, size, 1 if binary else 3, binary=binary))
    nothing = ("weight_normalized", "num_batches_tracked")
    shapes = {key: shape for key, shape in shapes.items() if not key.endswith(nothing)}
    assert {key: shape for key, (shape, _) in Layout(model).arrays.items()} == shapes


@pytest.mark.parametrize(
    "use_se", [pytest.param(False, marks=pytest.mark.slow, id="plain"), pytest.param(True, id="se")]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_imported_whatever_its_batch_norms_are_called(
    architecture, use_se, tmp_path
):
    config = dataclasses.replace(SMALL, arch_instance=architecture, use_se=use_se)
    model = NVAE(config, COLOUR)
    for seed, spelling in enumerate(SPELLINGS):
        layout = Layout(model, spelling)
        assert {weight for _, weight in layout.arrays.values()} == set(weights_below(model))
        state = layout.draw(seed)
        torch_import.load_state(model, state)
        layout.assert_holds(state)

    # And as a file, in the official spelling.
    layout, storages, tensors = Layout(model), [], collections.OrderedDict()
    state = {key: array for key, array in layout.draw(9).items() if array.ndim}
    for key, array in state.items():
        storages.append(Storage(str(len(storages)), array.ravel()))
        tensors[key] = Rebuilt(storages[-1], array.shape)
    flags = argparse.Namespace(dataset="cifar10", **dataclasses.asdict(config))
    content = {"state_dict": tensors, "args": flags, "global_step": 7}
    write_zip(tmp_path / "model.pt", content, storages)
    loaded = loading.load(str(tmp_path / "model.pt"))
    assert loaded.step == 7
    Layout(loaded.model).assert_holds(state)


def test_one_group_has_a_start_that_nothing_uses():
    alone = dict(num_latent_scales=1, num_groups_per_scale=1, arch_instance="res_bnelu")
    model = NVAE(dataclasses.replace(SMALL, **alone), COLOUR)
    layout = Layout(model)
    state = layout.draw(0)
    torch_import.load_state(model, {**state, "prior_ftr0": np.zeros((16, 16, 16), np.float32)})
    layout.assert_holds(state)


def test_an_array_that_does_not_fit_is_named_as_the_file_does():
    config = dataclasses.replace(SMALL, arch_instance="res_bnelu")
    model = NVAE(config, COLOUR)
    before = model.get_weights()
    whole = Layout(model).draw(0)
    key = "enc_tower.0._ops.1.bn.bn.bias"
    another = "enc_tower.0._ops.1.bn_act.bias"
    for state, message in (
        ({k: v for k, v in whole.items() if k != key}, "enc_tower.0._ops.1.bn.*bias missing"),
        ({**whole, key: np.zeros(5, np.float32)}, rf"{key} has shape \(5,\), not \(32,\)"),
        ({**whole, "enc_tower.0.bn.bn.bias": whole[key]}, "enc_tower.0.bn.bn.bias left over"),
        ({**whole, another: whole[key]}, f"{key} and {another} are one array"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            torch_import.load_state(model, state)
        assert "\n" not in str(caught.value)
    for one, other in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, other)

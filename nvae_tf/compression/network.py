"""The network as a codec needs it: one image at a time, and a stop at every latent group.

Encoder and decoder have to compute the same numbers to the bit. So each step is one traced function
that both call, with a batch of one image, in float32 on the CPU.
"""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from nvae_tf.distributions import DiscretizedLogisticMixture, bernoulli_image
from nvae_tf.engine.kernels import NormalizedKernel
from nvae_tf.io.errors import UserError
from nvae_tf.layers.latent_group import LatentGroup
from nvae_tf.model import NVAE


@dataclasses.dataclass
class GroupState:
    """What the walk knows of a group before its z.

    Attributes:
        s: The running map that its prior and posterior are computed from; an empty list if there is
            none, or the map alone in a list.
        raw: Raw mean and log-stddev of its prior.
        prior: Mean and standard deviation of each latent under the prior, float32 (latents,).
    """

    s: list
    raw: tuple
    prior: tuple[np.ndarray, np.ndarray]


class Network:
    """The steps of a model's walk.

    Args:
        model: The model; its weights are read once.

    Raises:
        UserError: Images of this model cannot be coded.
    """

    def __init__(self, model: NVAE):
        check_can_code(model)
        self.model = model
        self.max_level = 1 if model.image.binary else 2**model.num_bits - 1
        with tf.device("CPU"):
            scope = model.scope()
            kernels = {
                layer: NormalizedKernel(layer.effective_kernel(scope))
                for layer in model.convolutions
            }
        self._scope = dataclasses.replace(scope, kernels=kernels)
        self._bottom_up = _traced(functools.partial(model.bottom_up, scope=self._scope))
        self._before, self._after, self._posterior = [], [], []
        layers = []  # between the group before and this one
        for layer in model.decoder_tower:
            if isinstance(layer, LatentGroup):
                self._before.append(_traced(functools.partial(self._before_group, layers, layer)))
                self._posterior.append(_traced(functools.partial(self._posterior_of, layer)))
                self._after.append(_traced(functools.partial(self._after_group, layer)))
                layers = []
            else:
                layers.append(layer)
        self._head = _traced(functools.partial(self._image_parameters, layers))

    def bottom_up(self, levels: np.ndarray) -> list:
        """Encodes an image.

        Args:
            levels: Its levels, integers (height, width, channels).

        Returns:
            The encoder's maps, top of the hierarchy first.
        """
        return self._bottom_up(self._image(levels))

    def start(self) -> list:
        """The map that the walk starts from, as `GroupState.s` has it."""
        top = self.model.top
        return [] if top is None else [self._scope.value(top)[None]]

    def before(self, group: int, s: list) -> GroupState:
        """Walks from the map after the group before to what this group's latents depend on.

        Args:
            group: Index of the group.
            s: What `start` or `after` returned.
        """
        s, raw, prior = self._before[group](s)
        return GroupState(s, raw, _flat(prior))

    def posterior(self, group: int, state: GroupState, encoded) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each latent of a group under its posterior, (latents,).

        Args:
            group: Index of the group.
            state: What `before` returned.
            encoded: The encoder's map for the group.
        """
        return _flat(self._posterior[group](state.s, state.raw, encoded))

    def after(self, group: int, state: GroupState, z: np.ndarray) -> list:
        """The next map.

        Args:
            group: Index of the group.
            state: What `before` returned.
            z: The group's latents, float32 (latents,).
        """
        shaped = tf.constant(z.reshape(1, *self.model.latent_shapes[group]))
        return self._after[group](state.s, shaped)

    def image_parameters(self, s: list) -> list[np.ndarray]:
        """What p(x | z) is made from: logits, and for colours means, log-scales and coefficients.

        Args:
            s: What `after` returned for the last group.

        Returns:
            float32 arrays (height, width, ...) whose pixels `BinaryPixels` and `ColourPixels` take.
        """
        parameters = [part.numpy()[0] for part in self._head(s)]
        _check_finite(parameters)
        return parameters

    def _image(self, levels):
        unit = levels.astype(np.float32) / np.float32(self.max_level)
        return tf.constant(unit[None])

    def _before_group(self, layers, group: LatentGroup, s):
        running = s[0] if s else None
        for layer in [*layers, *group.cells]:
            running = layer(running, scope=self._scope)
        raw = group.prior_parameters(running, self._scope)
        prior = group.prior(raw)
        return [] if running is None else [running], raw, (prior.loc, prior.scale)

    def _posterior_of(self, group: LatentGroup, s, raw, encoded):
        base = group.posterior_before_flows(s[0] if s else None, encoded, raw, self._scope)
        return base.loc, base.scale

    def _after_group(self, group: LatentGroup, s, z):
        return [group.after_latents(s[0] if s else None, z, self._scope)]

    def _image_parameters(self, layers, s):
        model, running = self.model, s[0]
        for layer in [*layers, *model.postprocess]:
            running = layer(running, scope=self._scope)
        parameters = model.image_head(tf.nn.elu(running), scope=self._scope)
        if model.image.binary:
            return [bernoulli_image(parameters).distribution.logits]
        mixture = DiscretizedLogisticMixture(
            parameters,
            model.num_bits,
            min_log_scale=model.config.min_log_scale,
            channels=model.image.channels,
            exact=True,
        )
        return [mixture.logits, mixture.means, mixture.log_scales, mixture.coefficients]


def check_can_code(model: NVAE) -> None:
    """Checks that images of a model can be coded.

    Raises:
        UserError: They cannot.
    """
    if model.config.num_nf:
        raise UserError(
            f"num_nf: {model.config.num_nf} cannot be coded: with flows the posterior of a latent "
            "depends on its neighbours, and bins of one latent alone have no probability; train with "
            "num_nf 0"
        )
    if not model.image.binary and model.config.num_mixture_dec == 1:
        raise UserError(
            "num_mixture_dec: 1 cannot be coded: a normal decoder gives densities, not "
            "probabilities of levels; train with num_mixture_dec 2 or more"
        )
    if model.precision != "float32":
        raise UserError(f"precision: {model.precision} cannot be coded; load the model in float32")


def _traced(function):
    # A partial, because TensorFlow warns of many traces of functions with the same code.
    return tf.function(functools.partial(_on_cpu, function), autograph=False)


def _on_cpu(function, *arguments):
    with tf.device("CPU"):
        return function(*arguments)


def _flat(parameters) -> tuple[np.ndarray, np.ndarray]:
    mean, stddev = (part.numpy().reshape(-1) for part in parameters)
    _check_finite([mean, stddev])
    return mean, stddev


def _check_finite(parameters: list[np.ndarray]) -> None:
    if not all(np.isfinite(part).all() for part in parameters):
        raise UserError("the model computes values that are not finite for this image")

"""One latent group of the hierarchy, and the sources that its latents come from."""

from typing import NamedTuple

import tensorflow as tf
import tensorflow_probability as tfp

from nvae_tf.distributions import clamped_normal
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import call_block
from nvae_tf.layers.base import Layer, create_chain
from nvae_tf.layers.cells import ResidualCell
from nvae_tf.layers.convolution import Conv2D
from nvae_tf.layers.flows import IAFCell

tfb, tfd = tfp.bijectors, tfp.distributions


class GroupOutput(NamedTuple):
    """A group's latents, and the terms of the objective that belong to them.

    All attributes but z are None unless z comes from the posterior.

    Attributes:
        z: Latents, (batch, height, width, latents).
        kl: KL(q || p) of every latent in nats, shaped as z. With flows it is the estimate
            log q(z) - log p(z) at this z.
        log_q: log q(z | x, z of the groups before) of each image in nats, (batch,).
        log_p: log p(z | z of the groups before) of each image in nats, (batch,).
        mean: Mean of the posterior before its flows, shaped as z.
        stddev: Standard deviation of the posterior before its flows, shaped as z.
    """

    z: tf.Tensor
    kl: tf.Tensor | None = None
    log_q: tf.Tensor | None = None
    log_p: tf.Tensor | None = None
    mean: tf.Tensor | None = None
    stddev: tf.Tensor | None = None

    @property
    def kl_per_image(self):
        """KL of this group for each image in nats, (batch,)."""
        return tf.reduce_sum(self.kl, [1, 2, 3])


class LatentGroup(Layer):
    """All layers of one latent group: its cells, prior, posterior, flows and combiner.

    Args:
        first: Whether the group is the top of the hierarchy, which has a fixed prior and no cells.
        latent_shape: Shape of z, (height, width, latents).
        filters_enc: Number of channels of the encoder's map at this scale.
        filters_dec: Number of channels of the decoder's map at this scale.
        operations: Names of the operations in the cells (see `ResidualCell`).
        num_cells: Number of decoder cells before the latents; the first group has none.
        use_se: Whether the cells end in squeeze-and-excitation.
        res_dist: Whether the posterior's parameters are relative to the prior's; never so in the first
            group.
        num_flows: Number of flow cells on the posterior's z.
        stddev: How standard deviations are computed from the network's outputs (see `clamped_normal`).

    Call arguments:
        s: The decoder's running map, (batch, height, width, filters_dec); None if the model has only
            one group.
        source: The source of z: `FromPosterior`, `FromPrior` or `Given`.
        index: Position of the group in decoder order, 0 for the top of the hierarchy.
        scope: How the layers are run.

    Returns:
        The next running map (batch, height, width, filters_dec), and a `GroupOutput`.

    Reference: NVAE paper, figure 2 and section 3.2 ("residual normal distributions").
    """

    def __init__(
        self,
        first,
        latent_shape,
        filters_enc,
        filters_dec,
        operations,
        num_cells,
        use_se,
        res_dist,
        num_flows,
        stddev="exp",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.first, self.latent_shape = first, tuple(latent_shape)
        self.filters_enc, self.filters_dec = filters_enc, filters_dec
        self.operations, self.num_cells = tuple(operations), num_cells
        self.use_se, self.res_dist, self.num_flows = use_se, res_dist, num_flows
        self.stddev = stddev
        num_parameters = 2 * self.latent_shape[-1]  # mean and log-stddev of each latent
        self.cells = [
            ResidualCell(operations, filters_dec, use_se=use_se)
            for _ in range(0 if first else num_cells)
        ]
        self.prior_sampler = None if first else Conv2D(num_parameters, 1)
        self.encoder_combiner = None if first else Conv2D(filters_enc, 1)
        self.posterior_sampler = Conv2D(num_parameters, 3)
        self.flows = [IAFCell() for _ in range(num_flows)]
        self.combiner = Conv2D(filters_dec, 1)

    def create(self, input_shape):
        """Creates the weights of all layers.

        Args:
            input_shape: Shape of the running map; 0 channels stand for no map (a single group).
        """
        channels, latents = input_shape[-1], self.latent_shape[-1]
        create_chain(self.cells, channels)
        for sampler in [self.prior_sampler, self.encoder_combiner]:
            create_chain([sampler] if sampler else [], self.filters_dec)
        create_chain([self.posterior_sampler], self.filters_enc)
        create_chain(self.flows, latents)
        create_chain([self.combiner], channels + latents)

    def compute_output_shape(self, input_shape):
        """The shape of the next running map; height and width are left unknown."""
        return tf.TensorShape((input_shape[0], None, None, self.filters_dec))

    def call(self, s, source, index, scope: Scope):
        """Takes one step of the top-down walk: cells, z from the source, combiner."""
        for cell in self.cells:
            s = cell(s, scope=scope)
        output = source(self, index, s, scope)
        return self.after_latents(s, output.z, scope), output

    def after_latents(self, s, z, scope: Scope):
        """Combines the running map and z to the next running map.

        Args:
            s: The running map after the group's cells, or None.
            z: Latents, (batch, height, width, latents).
            scope: How the layers are run.

        Returns:
            A map (batch, height, width, filters_dec).
        """
        maps = [z] if s is None else [s, tf.cast(z, s.dtype)]
        return call_block(_combine, [self.combiner], maps, scope)

    @property
    def samplers(self) -> list[Layer]:
        """The layers that compute prior, posterior and z from the running map."""
        layers = [self.prior_sampler, self.encoder_combiner, self.posterior_sampler, *self.flows]
        return [layer for layer in layers if layer is not None]

    def prior_parameters(self, s, scope: Scope):
        """Mean and log-stddev of p(z | z of the groups before), before the soft clamp.

        Args:
            s: The running map after the group's cells, (batch, height, width, filters_dec).
            scope: How the layers are run.

        Returns:
            Two tensors (batch, height, width, latents); for the first group zeros, without batch axis.
        """
        if self.prior_sampler is None:
            return tf.zeros(self.latent_shape), tf.zeros(self.latent_shape)
        return _mean_and_log_stddev(self.prior_sampler(tf.nn.elu(s), scope=scope))

    def prior(self, parameters, temperature=1.0):
        """The prior p(z | z of the groups before).

        Args:
            parameters: The result of `prior_parameters`.
            temperature: Factor on the standard deviations.

        Returns:
            A `tfd.Normal` over each latent, batch shape (batch, height, width, latents); without the
            batch axis for the first group.
        """
        mu, log_sigma = parameters
        return clamped_normal(mu, log_sigma, temperature, self.stddev)

    def posterior_before_flows(self, s, encoded, prior_parameters, scope: Scope):
        """The normal distribution that the flows transform into the posterior.

        Args:
            s: The running map after the group's cells.
            encoded: The encoder's map for this group, (batch, height, width, filters_enc); for the
                first group, the top of the encoder.
            prior_parameters: The result of the method `prior_parameters`.
            scope: How the layers are run.

        Returns:
            A `tfd.Normal` over each latent, batch shape (batch, height, width, latents).
        """
        if self.encoder_combiner is not None:
            encoded = encoded + self.encoder_combiner(s, scope=scope)
        mu, log_sigma = _mean_and_log_stddev(self.posterior_sampler(encoded, scope=scope))
        if self.res_dist and not self.first:
            prior_mu, prior_log_sigma = prior_parameters
            mu, log_sigma = prior_mu + mu, prior_log_sigma + log_sigma
        return clamped_normal(mu, log_sigma, stddev=self.stddev)

    def draw_posterior(self, encoded, noise, s=None, *, scope: Scope) -> GroupOutput:
        """Draws z from the posterior, and computes its KL.

        Args:
            encoded: As for `posterior_before_flows`.
            noise: Standard-normal tensor, (batch, height, width, latents).
            s: As for `posterior_before_flows`; None if the model has only one group.
            scope: How the layers are run.
        """
        parameters = self.prior_parameters(s, scope)
        prior = self.prior(parameters)
        base = self.posterior_before_flows(s, encoded, parameters, scope)
        before_flows = z = base.loc + base.scale * noise
        for flow in self.flows:
            z = flow(z, scope=scope)
        # The flows preserve volume, so this is also the log-density of z.
        log_q = base.log_prob(before_flows)
        log_p = prior.log_prob(z)
        kl = log_q - log_p if self.num_flows else tfd.kl_divergence(base, prior)
        log_q, log_p = tf.reduce_sum(log_q, [1, 2, 3]), tf.reduce_sum(log_p, [1, 2, 3])
        return GroupOutput(z, kl, log_q, log_p, base.loc, base.scale)

    def posterior(self, s, encoded, prior_parameters, scope: Scope):
        """The posterior q(z | x, z of the groups before) as a single TFP distribution.

        Args:
            s: As for `posterior_before_flows`.
            encoded: As for `posterior_before_flows`.
            prior_parameters: As for `posterior_before_flows`.
            scope: As for `posterior_before_flows`.

        Returns:
            A `tfd.TransformedDistribution`: independent normals transformed by the group's flows, with
            event shape (height, width, latents).
        """
        base = self.posterior_before_flows(s, encoded, prior_parameters, scope)
        shifts = [bijector for flow in self.flows for bijector in flow.bijectors(scope)]
        return tfd.TransformedDistribution(tfd.Independent(base, 3), tfb.Chain(shifts[::-1]))

    def get_config(self):
        """The constructor's arguments."""
        names = (
            "first", "latent_shape", "filters_enc", "filters_dec", "operations", "num_cells",
            "use_se", "res_dist", "num_flows", "stddev",
        )  # fmt: skip
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


class FromPosterior:
    """Source that draws z from the posterior, with its KL: for training, reconstruction, likelihood.

    Args:
        encoded: The encoder's maps, one per group, top of the hierarchy first.
        noise: Standard-normal tensors, one per group, (batch, height, width, latents).
    """

    def __init__(self, encoded, noise):
        self.encoded, self.noise = encoded, noise
        self.batch_size = tf.shape(encoded[0])[0]

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its posterior."""
        inputs = [self.encoded[index], self.noise[index], *([] if s is None else [s])]
        draw = LatentGroup.draw_posterior
        return call_block(draw, [group], inputs, scope, uses=group.samplers)


def _combine(combiner: Conv2D, *maps, scope: Scope):
    return combiner(tf.concat(maps, -1) if len(maps) > 1 else maps[0], scope=scope)


class FromPrior:
    """Source that draws z from the prior: for generation.

    Args:
        noise: Standard-normal tensors, one per group, (batch, height, width, latents), top of the
            hierarchy first.
        temperature: Factor on the priors' standard deviations: one number, or one per group.
    """

    def __init__(self, noise, temperature=1.0):
        self.noise = noise
        self.temperatures = tf.broadcast_to(tf.cast(temperature, tf.float32), [len(noise)])
        self.batch_size = tf.shape(noise[0])[0]

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its prior."""
        prior = group.prior(group.prior_parameters(s, scope), self.temperatures[index])
        return GroupOutput(prior.loc + prior.scale * self.noise[index])


class Given:
    """Source that returns given latents for the first groups, and asks another source for the rest.

    Args:
        latents: z of the first groups, (batch, height, width, latents) each, top of the hierarchy
            first.
        rest: The source for the remaining groups; not needed if `latents` holds z of all groups.
    """

    def __init__(self, latents, rest=None):
        self.latents, self.rest = latents, rest
        self.batch_size = tf.shape(latents[0])[0] if latents else rest.batch_size

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Returns the given z of a group, or asks the other source if there is none."""
        if index < len(self.latents):
            return GroupOutput(self.latents[index])
        return self.rest(group, index, s, scope)


def _mean_and_log_stddev(parameters):
    # Distributions are computed in float32, whatever the precision of the activations.
    return tf.split(tf.cast(parameters, tf.float32), 2, -1)

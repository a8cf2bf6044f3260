"""One latent group of the hierarchy, and the sources that its latents may come from."""

from typing import NamedTuple

import tensorflow as tf
import tensorflow_probability as tfp

from nvae_tf.distributions import clamped_normal, from_noise
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import call_block
from nvae_tf.layers.base import Layer, create_chain
from nvae_tf.layers.cells import ResidualCell
from nvae_tf.layers.convolution import Conv2D
from nvae_tf.layers.flows import IAFCell

tfb, tfd = tfp.bijectors, tfp.distributions


class GroupOutput(NamedTuple):
    """A group's latents and, where a posterior was there to compare with, their probabilities.

    Attributes:
        z: (batch, height, width, latents).
        kl: KL from prior to posterior of every latent, in nats, shaped as z; or None.
        log_q: log q(z | x, z of the groups before) of each image, in nats, (batch,); or None.
        log_p: log p(z | z of the groups before) of each image, in nats, (batch,); or None.
        mean: of the posterior, before flows, shaped as z; or None.
        stddev: Standard deviation of the posterior, shaped as z; or None.
    """

    z: tf.Tensor
    kl: tf.Tensor | None = None
    log_q: tf.Tensor | None = None
    log_p: tf.Tensor | None = None
    mean: tf.Tensor | None = None
    stddev: tf.Tensor | None = None

    @property
    def kl_per_image(self):
        """KL of each image in nats, (batch,)."""
        return tf.reduce_sum(self.kl, [1, 2, 3])


class LatentGroup(Layer):
    """All that belongs to one group: its cells, prior, posterior, flows and combiner.

    Args:
        first: Whether it is the top of the hierarchy, which has a fixed prior and no cells.
        latent_shape: (height, width, latents) of z.
        filters_enc: channels of the encoder's map at this scale.
        filters_dec: channels of the decoder's map at this scale.
        operations: what the cells are made of (see `ResidualCell`).
        num_cells: Decoder cells before the latents; the first group has none.
        use_se: squeeze-and-excitation in the cells.
        res_dist: posterior parameters relative to the prior's (but in the first group).
        num_flows: flow cells on the posterior's z.

    Call arguments:
        s: the decoder's running map, (batch, height, width, filters_dec); None where the model has
            one group only.
        source: Where z comes from: `FromPosterior`, `FromPrior` or `Given`.
        index: Place of the group in decoder order, 0 for the top of the hierarchy, for the source.

    Returns:
        The next running map, and a `GroupOutput`.

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
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.first, self.latent_shape = first, tuple(latent_shape)
        self.filters_enc, self.filters_dec = filters_enc, filters_dec
        self.operations, self.num_cells = tuple(operations), num_cells
        self.use_se, self.res_dist, self.num_flows = use_se, res_dist, num_flows
        twice = 2 * self.latent_shape[-1]
        self.cells = [
            ResidualCell(operations, filters_dec, use_se=use_se)
            for _ in range(0 if first else num_cells)
        ]
        self.prior_sampler = None if first else Conv2D(twice, 1)
        self.encoder_combiner = None if first else Conv2D(filters_enc, 1)
        self.posterior_sampler = Conv2D(twice, 3)
        self.flows = [IAFCell() for _ in range(num_flows)]
        self.combiner = Conv2D(filters_dec, 1)

    def create(self, input_shape):
        """Makes every layer.

        Args:
            input_shape: Shape of the running map; its channels count as 0 where there is none.
        """
        channels, latents = input_shape[-1], self.latent_shape[-1]
        create_chain(self.cells, channels)
        for sampler in [self.prior_sampler, self.encoder_combiner]:
            create_chain([sampler] if sampler else [], self.filters_dec)
        create_chain([self.posterior_sampler], self.filters_enc)
        create_chain(self.flows, latents)
        create_chain([self.combiner], channels + latents)

    def compute_output_shape(self, input_shape):
        """The running map's."""
        return tf.TensorShape((input_shape[0], None, None, self.filters_dec))

    def call(self, s, source, index, scope: Scope):
        """One step of the top-down walk."""
        for cell in self.cells:
            s = cell(s, scope=scope)
        latent = source(self, index, s, scope)
        maps = [latent.z] if s is None else [s, tf.cast(latent.z, s.dtype)]
        return call_block(_combine, [self.combiner], maps, scope), latent

    @property
    def samplers(self) -> list[Layer]:
        """The layers between the running map and z."""
        layers = [self.prior_sampler, self.encoder_combiner, self.posterior_sampler, *self.flows]
        return [layer for layer in layers if layer is not None]

    def prior_parameters(self, s, scope: Scope):
        """Raw mean and log-deviation of p(z | z of the groups before)."""
        if self.prior_sampler is None:
            return tf.zeros(self.latent_shape), tf.zeros(self.latent_shape)
        return _halves(self.prior_sampler(tf.nn.elu(s), scope=scope))

    def prior(self, s, scope: Scope, temperature=1.0):
        """p(z | z of the groups before), a normal distribution."""
        mu, log_sigma = self.prior_parameters(s, scope)
        return clamped_normal(mu, log_sigma, temperature)

    def posterior(self, s, encoded, prior_parameters, scope: Scope):
        """q(z | x, z of the groups before).

        Args:
            s: the running map after the group's cells.
            encoded: the encoder's map for this group (for the first: the top of the encoder).
            prior_parameters: from `prior_parameters`.
            scope: How the layers are run.

        Returns:
            A TransformedDistribution: independent normals under the group's flows, with events
            (height, width, latents).
        """
        if self.encoder_combiner is not None:
            encoded = encoded + self.encoder_combiner(s, scope=scope)
        mu, log_sigma = _halves(self.posterior_sampler(encoded, scope=scope))
        if self.res_dist and not self.first:
            prior_mu, prior_log_sigma = prior_parameters
            mu, log_sigma = prior_mu + mu, prior_log_sigma + log_sigma
        shifts = [bijector for flow in self.flows for bijector in flow.bijectors(scope)]
        base = tfd.Independent(clamped_normal(mu, log_sigma), 3)
        return tfd.TransformedDistribution(base, tfb.Chain(shifts[::-1]))

    def get_config(self):
        """The constructor's arguments."""
        names = (
            "first", "latent_shape", "filters_enc", "filters_dec", "operations", "num_cells",
            "use_se", "res_dist", "num_flows",
        )  # fmt: skip
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


class FromPosterior:
    """Latents from the posterior, with their KL: training, reconstruction, likelihood.

    Args:
        encoded: the encoder's maps, one a group, top of the hierarchy first.
        noise: standard-normal tensors shaped as each group's z.
    """

    def __init__(self, encoded, noise):
        self.encoded, self.noise = encoded, noise
        self.batch_size = tf.shape(encoded[0])[0]

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its posterior."""
        inputs = [self.encoded[index], self.noise[index], *([] if s is None else [s])]
        return call_block(_draw_posterior, [group], inputs, scope, uses=group.samplers)


def _draw_posterior(group: LatentGroup, encoded, noise, s=None, *, scope: Scope) -> GroupOutput:
    parameters = group.prior_parameters(s, scope)
    prior = clamped_normal(*parameters)
    posterior = group.posterior(s, encoded, parameters, scope)
    base = posterior.distribution.distribution  # latent by latent
    before_flows = from_noise(base, noise)
    z = posterior.bijector.forward(before_flows)
    # The flows preserve volume, so this is the density of z too, latent by latent.
    log_q = base.log_prob(before_flows)
    log_p = prior.log_prob(z)
    kl = log_q - log_p if group.num_flows else tfd.kl_divergence(base, prior)
    log_q, log_p = tf.reduce_sum(log_q, [1, 2, 3]), tf.reduce_sum(log_p, [1, 2, 3])
    return GroupOutput(z, kl, log_q, log_p, base.loc, base.scale)


def _combine(combiner: Conv2D, *maps, scope: Scope):
    return combiner(tf.concat(maps, -1) if len(maps) > 1 else maps[0], scope=scope)


class FromPrior:
    """Latents from the prior: generation.

    Args:
        noise: standard-normal tensors shaped as each group's z, top of the hierarchy first.
        temperature: factor on the prior's deviations: one number, or one for each group.
    """

    def __init__(self, noise, temperature=1.0):
        self.noise = noise
        self.temperatures = tf.broadcast_to(tf.cast(temperature, tf.float32), [len(noise)])
        self.batch_size = tf.shape(noise[0])[0]

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its prior."""
        prior = group.prior(s, scope, self.temperatures[index])
        return GroupOutput(from_noise(prior, self.noise[index]))


class Given:
    """Latents given from outside for the first groups; the rest from another source.

    Args:
        latents: z of the first groups, top of the hierarchy first.
        otherwise: the source for the groups after those.
    """

    def __init__(self, latents, otherwise=None):
        self.latents, self.otherwise = latents, otherwise
        self.batch_size = tf.shape(latents[0])[0] if latents else otherwise.batch_size

    def __call__(self, group: LatentGroup, index: int, s, scope: Scope) -> GroupOutput:
        """Hands out what was given."""
        if index < len(self.latents):
            return GroupOutput(self.latents[index])
        return self.otherwise(group, index, s, scope)


def _halves(parameters):
    # Distributions are float32 whatever the precision of activations.
    return tf.split(tf.cast(parameters, tf.float32), 2, -1)

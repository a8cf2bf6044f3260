"""Bits-back coding of images through the whole hierarchy of latents, one after the other on one stack.

Encoding an image pops z of each group with its posterior, from the top of the hierarchy down, since a
posterior depends on the groups before. Then it pushes the image with p(x | z), and z with the priors,
from the bottom up. Decoding is the same backwards: it pops z with the priors, from the top down, then
the image, and pushes z with the posteriors. So an image adds to the stack -log p(x | z) - log p(z) +
log q(z | x), whose mean is the NELBO.

References: Townsend et al., *Practical lossless compression with latent variables using bits back
coding*, 2019; Kingma et al., *Bit-Swap*, 2019; Townsend et al., *HiLLoC*, 2020.
"""

import dataclasses

import numpy as np

from nvae_tf.compression.cdfs import BinaryPixels, ColourPixels, LatentBins, Posterior, bits
from nvae_tf.compression.network import GroupState, Network
from nvae_tf.compression.rans import Stack, interval, intervals


@dataclasses.dataclass
class Codec:
    """A model as a codec.

    Attributes:
        network: The network.
        left_out: For each group which latents are not coded, bool (latents,). Those are drawn from the
            prior, by noise that encoder and decoder share.
        padded: Whether padding around the scored part of the images (`ImageSpec.scored_size`) is left
            out, too, since it is 0 in all of them.
        lanes: Number of lanes of the stack.
        seed: Seed of that noise.
        bins: The bins of the latents.
    """

    network: Network
    left_out: list[np.ndarray]
    padded: bool
    lanes: int
    seed: int
    bins: LatentBins = dataclasses.field(default_factory=LatentBins)

    def encode(self, stack: Stack, levels: np.ndarray, index: int) -> float:
        """Puts an image onto a stack.

        Args:
            stack: The stack.
            levels: The image's levels, integers (height, width, channels).
            index: Index of the image in its file.

        Returns:
            The negative evidence lower bound of this draw of z, log q(z | x) - log p(x, z), in bits.
        """
        network, encoded = self.network, self.network.bottom_up(levels)
        s, coded, nats = network.start(), [], 0.0
        for group, maps in enumerate(encoded):
            state = network.before(group, s)
            kept = np.flatnonzero(~self.left_out[group])
            posterior = network.posterior(group, state, maps)
            distribution = Posterior(self.bins, state.prior, posterior)
            chosen = self._shared_bins(index, group)
            chosen[kept] = stack.pop(distribution, kept, self.bins.count)
            z = self._latents(state, chosen)
            nats += _log_ratio(
                z[kept], *((part[kept] for part in p) for p in (posterior, state.prior))
            )
            coded.append((kept, chosen[kept]))
            s = network.after(group, state, z)
        nats += self._push_image(stack, network.image_parameters(s), levels)
        for kept, chosen in reversed(coded):
            stack.push(*interval(self.bins.prior, kept, chosen))
        return bits(nats)

    def decode(self, stack: Stack, index: int) -> np.ndarray:
        """Takes an image from a stack: the last one that was put onto it.

        Args:
            stack: The stack.
            index: Index of the image in its file.

        Returns:
            Its levels, integers (height, width, channels).

        Raises:
            Exhausted: The stack is damaged.
        """
        network, s, walked = self.network, self.network.start(), []
        for group in range(len(self.left_out)):
            state = network.before(group, s)
            kept = np.flatnonzero(~self.left_out[group])
            chosen = self._shared_bins(index, group)
            chosen[kept] = stack.pop(self.bins.prior, kept, self.bins.count)
            walked.append((state, kept, chosen[kept]))
            s = network.after(group, state, self._latents(state, chosen))
        levels = self._pop_image(stack, network.image_parameters(s))
        encoded = network.bottom_up(levels)
        for group in reversed(range(len(walked))):
            state, kept, chosen = walked[group]
            posterior = network.posterior(group, state, encoded[group])
            distribution = Posterior(self.bins, state.prior, posterior)
            stack.push(*intervals(distribution, kept, chosen, self.lanes))
        return levels

    def _shared_bins(self, index: int, group: int) -> np.ndarray:
        """Bins from the prior for all latents of a group."""
        noise = np.random.Philox(key=self.seed, counter=[0, 0, group, index])
        words = noise.random_raw(len(self.left_out[group]))
        return self.bins.from_words(words)

    def _latents(self, state: GroupState, chosen: np.ndarray) -> np.ndarray:
        mean, stddev = state.prior
        return mean + stddev * self.bins.centres[chosen]

    def _push_image(self, stack: Stack, parameters, levels) -> float:
        """Pushes an image, and returns -log p(x | z) in nats."""
        rows, columns = self._coded_part
        flat = levels[rows, columns].reshape(-1, levels.shape[-1]).astype(np.int64)
        positions = np.arange(len(flat))
        if self.network.model.image.binary:
            flat, positions = flat.reshape(-1), np.arange(flat.size)
            pixels = self._binary(parameters)
            stack.push(*intervals(pixels, positions, flat, self.lanes))
            return pixels.neg_log_likelihood(flat)
        colours, pieces = self._colours(parameters), []
        for channel in flat.T:
            distribution = colours.next_channel()
            pieces.append(intervals(distribution, positions, channel, self.lanes))
            colours.observe(distribution, channel)
        for piece in reversed(pieces):
            stack.push(*piece)
        return colours.neg_log_likelihood

    @property
    def _coded_part(self) -> tuple[slice, slice]:
        """The rows and the columns of an image that are coded."""
        return self.network.model.image.scored_part if self.padded else (slice(None), slice(None))

    def _binary(self, parameters) -> BinaryPixels:
        rows, columns = self._coded_part
        return BinaryPixels(parameters[0][rows, columns].reshape(-1))

    def _colours(self, parameters) -> ColourPixels:
        rows, columns = self._coded_part
        logits, means, log_scales, coefficients = (
            _flat(part[rows, columns]) for part in parameters
        )
        return ColourPixels(logits, means, log_scales, coefficients, self.network.max_level)

    def _pop_image(self, stack: Stack, parameters) -> np.ndarray:
        levels = np.zeros(self.network.model.image.shape, np.int64)
        part = levels[self._coded_part]  # a view
        if self.network.model.image.binary:
            pixels = self._binary(parameters)
            part[...] = stack.pop(pixels, np.arange(part.size), 2).reshape(part.shape)
            return levels
        colours = self._colours(parameters)
        positions, channels = np.arange(part.shape[0] * part.shape[1]), []
        for _ in range(colours.channels):
            distribution = colours.next_channel()
            channels.append(stack.pop(distribution, positions, distribution.count))
            colours.observe(distribution, channels[-1])
        part[...] = np.stack(channels, -1).reshape(part.shape)
        return levels


def _flat(part: np.ndarray) -> np.ndarray:
    """(height, width, ...) as (pixels, ...), also where there are no values."""
    return part.reshape(part.shape[0] * part.shape[1], *part.shape[2:])


def _log_ratio(z, posterior, prior) -> float:
    """log q(z | x) - log p(z) of latents, in nats."""

    def log_density(mean, stddev):
        mean, stddev = np.asarray(mean, np.float64), np.asarray(stddev, np.float64)
        return -0.5 * ((z - mean) / stddev) ** 2 - np.log(stddev)

    return float((log_density(*posterior) - log_density(*prior)).sum())

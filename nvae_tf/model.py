"""NVAE: the bidirectional hierarchy of the paper's figures 2 and 3.

A bottom-up pass computes one map per latent group; a top-down walk visits the groups from the coarsest
to the finest. Training, reconstruction, generation and decoding differ only in the *source* of each
group's z (see `nvae_tf.layers.latent_group`).
"""

import dataclasses
import hashlib
import json
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from nvae_tf import checks, stateless_random
from nvae_tf.architectures import ARCHITECTURES
from nvae_tf.config import (
    AUTO,
    EXACT,
    OFFICIAL,
    ModelConfig,
    check_image,
    has_official_likelihood,
    load,
    model_config,
)
from nvae_tf.config_keys import check_choice
from nvae_tf.data.catalog import get_dataset_info
from nvae_tf.distributions import (
    DiscretizedLogisticMixture,
    NormalImage,
    bernoulli_image,
    mean_image,
    num_mixture_parameters,
    pixel_log_prob,
)
from nvae_tf.engine.replicas import replica_row
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.weights import (
    RowNames,
    Weight,
    layout,
    rows_of,
    stack_weights,
    walk,
    weights_below,
)
from nvae_tf.image_spec import ImageSpec, image_spec
from nvae_tf.keras_training import KerasTraining
from nvae_tf.layers.base import Uniform, create_chain
from nvae_tf.layers.batch_norm import BatchNormAct, update_running_averages
from nvae_tf.layers.cells import DOWN, NORMAL, UP, ResidualCell
from nvae_tf.layers.convolution import Conv2D
from nvae_tf.layers.latent_group import (
    FromPosterior,
    FromPrior,
    Given,
    GroupOutput,
    LatentGroup,
)
from nvae_tf.summary import summary_lines

PRECISIONS = ("float32", "float16", "bfloat16")

ROW_NAMES = "row_names"  # key in Keras's files, beside the stacks

# Folded into the seed of a sample's pixels, so that their noise differs from that of its latents.
PIXEL_STREAM = -1


class NVAEOutput(NamedTuple):
    """The result of one pass.

    The KL and log-densities exist only if z comes from the posterior.

    Attributes:
        parameters: Parameters of the image distribution, (batch, height, width, parameters).
        latents: One `GroupOutput` per group, top of the hierarchy first.
    """

    parameters: tf.Tensor
    latents: list[GroupOutput]

    @property
    def kl_per_group(self):
        """KL of each image and group in nats, (batch, groups), top of the hierarchy first."""
        return tf.stack([latent.kl_per_image for latent in self.latents], 1)

    @property
    def kl_per_channel(self):
        """KL of each image and latent channel in nats, (batch, groups, latents)."""
        return tf.stack([tf.reduce_sum(latent.kl, [1, 2]) for latent in self.latents], 1)

    @property
    def log_q(self):
        """log q(z | x) of each image in nats, (batch,)."""
        return tf.add_n([latent.log_q for latent in self.latents])

    @property
    def log_p(self):
        """log p(z) of each image in nats, (batch,)."""
        return tf.add_n([latent.log_p for latent in self.latents])


class NVAE(KerasTraining):
    """A deep hierarchical variational autoencoder for images.

    The methods check their arguments (`nvae_tf.checks`) and raise `UserError` if one is wrong.

    ```python
    NVAE.from_recipe("cifar10")
    NVAE(ModelConfig(num_latent_scales=2), ImageSpec(32, 32, 3))
    NVAE(num_latent_scales=2, image=(32, 32, 3))
    ```

    Args:
        config: Configuration of the model; default: the defaults of `ModelConfig`.
        image: Description of the images: an `ImageSpec`, or (height, width, channels).
        precision: Precision of activations, ``"float32"``, ``"float16"`` or ``"bfloat16"``. Weights,
            latents, distributions and statistics are always float32.
        binary: Whether pixels are 0 or 1; default: what an `ImageSpec` says, or False.
        name: The model's name in Keras.
        **keys: Keys of `ModelConfig` that change `config`.

    Call arguments:
        images: (batch, height, width, channels), values in [0, 1].
        noise: Standard-normal tensors (batch, height, width, latents), one per group (`draw_noise`);
            default: zeros, which give each z the mean of its posterior before the flows.
        training: Whether batch norm uses the batch's statistics, and moves its running averages towards
            them.

    Returns:
        An `NVAEOutput` with z from the posterior.

    Raises:
        ConfigError: A key or its value is not allowed, or the image cannot be halved as often as the
            configuration asks.
        UserError: In a call, the images or the noise have another type or shape.

    Reference: Vahdat & Kautz, *NVAE: A Deep Hierarchical Variational Autoencoder*, NeurIPS 2020.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        image: ImageSpec | tuple[int, int, int] | None = None,
        precision: str = "float32",
        *,
        binary: bool | None = None,
        name: str | None = None,
        **keys,
    ):
        super().__init__(name=name)
        config, image = model_config(config, keys), image_spec(image, binary)
        check_choice("precision", precision, PRECISIONS)
        check_image(config, image)
        self.config, self.image, self.precision = config, image, precision
        enc, dec = config.num_channels_enc, config.num_channels_dec
        operations = ARCHITECTURES[config.arch_instance]

        def cell(part, filters, direction=NORMAL):
            return ResidualCell(operations[part], filters, direction, config.use_se)

        # Bottom-up: stem and preprocess halve the image to the size of the finest latents.
        self.stem = Conv2D(enc, 3)
        self.preprocess = []
        width = 1  # factor on the channels, which double at every halving
        for _ in range(config.num_preprocess_blocks):
            for _ in range(config.num_preprocess_cells - 1):
                self.preprocess.append(cell("preprocess", enc * width))
            width *= 2
            self.preprocess.append(cell("preprocess", enc * width, DOWN))

        # The encoder tower: one list of cells per group, finest scale first.
        self.encoder_tower = []
        for scale, num_groups in enumerate(config.groups_per_scale):
            for group in range(num_groups):
                cells = []
                if scale > 0 and group == 0:
                    width *= 2
                    cells.append(cell("encoder", enc * width, DOWN))
                cells += [cell("encoder", enc * width) for _ in range(config.num_cell_per_cond_enc)]
                self.encoder_tower.append(cells)
        self.encoder_top = Conv2D(enc * width, 1)

        # Top-down: the groups, coarsest scale first, with an up cell between scales.
        size = (image.height // width, image.width // width)
        self.top_shape = (*size, dec * width)
        self.decoder_tower = []
        self.groups = []
        for scale, num_groups in enumerate(reversed(config.groups_per_scale)):
            if scale > 0:
                width, size = width // 2, (2 * size[0], 2 * size[1])
                self.decoder_tower.append(cell("decoder", dec * width, UP))
            for _ in range(num_groups):
                group = LatentGroup(
                    first=not self.groups,
                    latent_shape=(*size, config.num_latent_per_group),
                    filters_enc=enc * width,
                    filters_dec=dec * width,
                    operations=operations["decoder"],
                    num_cells=config.num_cell_per_cond_dec,
                    use_se=config.use_se,
                    res_dist=config.res_dist,
                    num_flows=config.num_nf,
                    stddev=config.latent_stddev,
                )
                self.groups.append(group)
                self.decoder_tower.append(group)

        # Postprocess and image head double the map to the size of the image.
        self.postprocess = []
        for _ in range(config.num_postprocess_blocks):
            width //= 2
            self.postprocess.append(cell("postprocess", dec * width, UP))
            for _ in range(config.num_postprocess_cells - 1):
                self.postprocess.append(cell("postprocess", dec * width))
        if image.binary:
            self._num_image_parameters = image.channels
        elif config.num_mixture_dec == 1:
            self._num_image_parameters = 2 * image.channels
        else:
            mixtures = config.num_mixture_dec
            self._num_image_parameters = num_mixture_parameters(image.channels, mixtures)
        self.image_head = Conv2D(self._num_image_parameters, 3)
        self._create_weights()

    @classmethod
    def from_recipe(cls, name: str, precision: str = "float32", **keys) -> "NVAE":
        """Builds a new, untrained model from a recipe.

        Args:
            name: Name of a recipe (`nvae_tf.list_recipes`), or the path of a YAML file.
            precision: As for the constructor.
            **keys: Keys of `ModelConfig` that change the recipe.

        Raises:
            ConfigError: There is no such recipe, or a key or its value is not allowed.
            UserError: The image size depends on the data set's files, and those are missing.
        """
        recipe = load(name)
        return cls(recipe.model, get_dataset_info(recipe.data).image, precision, **keys)

    def __repr__(self):
        height, width, channels = self.image.shape
        groups = " + ".join(map(str, reversed(self.config.groups_per_scale)))
        kind = "binary" if self.image.binary else f"{self.num_bits}-bit"
        return (
            f"<NVAE {self.name!r}: {kind} images {width}x{height}x{channels}, {groups} latent groups "
            f"(coarsest scale first), {self.num_parameters:,} parameters>"
        )

    def summary(self, line_length=None, positions=None, print_fn=print, **_):
        """Prints a table of the model's parts: encoder and decoder by scale and group.

        Args:
            line_length: Ignored, like all of Keras's other arguments.
            positions: Ignored.
            print_fn: Called with each line.
        """
        for line in summary_lines(self):
            (print_fn or print)(line)

    def __call__(self, images, noise=None, *args, **kwargs):
        """Checks the arguments and runs `call`. (Keras adds lines to errors that `call` raises.)"""
        checks.check_images(images, self.image)
        noise = self._noise_or_zeros(images, noise)
        checks.check_maps("noise", noise, self.latent_shapes, checks.batch_of(images))
        return super().__call__(images, noise, *args, **kwargs)

    def bottom_up(self, images, scope: Scope | None = None):
        """Encodes images.

        Args:
            images: As for `call`.
            scope: How the layers are run; default: in evaluation (the method `scope`).

        Returns:
            The encoder's maps (batch, height, width, channels), one per group, top of the hierarchy
            first.
        """
        if scope is None:
            checks.check_images(images, self.image)
            scope = self.scope()
        x = self.stem(tf.cast(2.0 * images - 1.0, self.precision), scope=scope)
        for cell in self.preprocess:
            x = cell(x, scope=scope)
        maps = []
        for cells in self.encoder_tower:
            for cell in cells:
                x = cell(x, scope=scope)
            maps.append(x)
        maps[-1] = tf.nn.elu(self.encoder_top(tf.nn.elu(x), scope=scope))
        return maps[::-1]

    def top_down(self, source, scope: Scope | None = None):
        """Walks the hierarchy from the top; every group's z comes from the source.

        Args:
            source: The source of every group's z: `FromPosterior`, `FromPrior` or `Given`.
            scope: How the layers are run; default: in evaluation (the method `scope`).

        Returns:
            An `NVAEOutput`.
        """
        scope = scope or self.scope()
        s, latents = self._initial_state(source.batch_size, scope), []
        for layer in self.decoder_tower:
            if isinstance(layer, LatentGroup):
                s, latent = layer(s, source, index=len(latents), scope=scope)
                s = tf.cast(s, self.precision)  # with a single group s is None until here
                latents.append(latent)
            else:
                s = layer(s, scope=scope)
        for cell in self.postprocess:
            s = cell(s, scope=scope)
        parameters = self.image_head(tf.nn.elu(s), scope=scope)
        return NVAEOutput(tf.cast(parameters, tf.float32), latents)

    @tf.autograph.experimental.do_not_convert
    def call(self, images, noise=None, training=False):
        """Runs one pass with z from the posterior; arguments as for calling the model."""
        scope = self.scope(training)
        encoded = self.bottom_up(images, scope)
        output = self.top_down(FromPosterior(encoded, self._noise_or_zeros(images, noise)), scope)
        update_running_averages(scope.statistics)
        return output

    def scope(self, training: bool = False) -> Scope:
        """A scope that runs the model's layers with the current weights.

        Args:
            training: Whether batch norms use the statistics of the batch.
        """
        stacks = {stack.ref(): tf.convert_to_tensor(stack) for stack in self.stacks}
        return Scope(
            training=training,
            values=rows_of(weights_below(self), stacks),
            replica_row=replica_row() if training else None,
        )

    def encode(self, images, noise=None):
        """Computes the latents of images.

        Args:
            images: As for `call`.
            noise: As for `call`.

        Returns:
            One `GroupOutput` per group, top of the hierarchy first: z, the posterior's mean and
            standard deviation (before flows), and the KL. With noise the KL is that of the objective;
            without noise it is the KL along the means, which is usually smaller.
        """
        return self(images, noise).latents

    def decode(self, latents, seed=None):
        """Decodes latents.

        Args:
            latents: z of every group, (batch, height, width, latents), top of the hierarchy first.
            seed: As for `render`.

        Returns:
            Images as returned by `render`.
        """
        checks.check_maps("latents", latents, self.latent_shapes, batch=None)
        return self.render(self.top_down(Given(latents)).parameters, seed)

    def reconstruct(self, images, noise=None, seed=None):
        """Encodes and decodes images; arguments as for `encode` and `render`."""
        return self.render(self(images, noise).parameters, seed)

    def sample(self, indices, temperature=1.0, latents=(), seed=(1, 0), scope: Scope | None = None):
        """Generates images.

        Args:
            indices: Number of images, or the index of each, (batch,). An image depends only on the seed
                and its index, not on the other images of the batch.
            temperature: Factor on the priors' standard deviations, one number or one per group. Colour
                pixels are drawn at the lowest temperature.
            latents: z of the first groups, each (batch, height, width, latents), top of the hierarchy
                first; z of the other groups is drawn.
            seed: Two integers, or one: 3 stands for (3, 0), the seed of the command's ``--seed 3``.
            scope: How the layers are run; default: in evaluation (the method `scope`).

        Returns:
            Images (batch, height, width, channels) in [0, 1]; for binary images, their means.
        """
        temperature = checks.as_temperature(temperature, len(self.groups), self._draws_pixels)
        noise = self.draw_noise(indices, seed)
        checks.check_maps("latents", latents, self.latent_shapes, checks.batch_of(noise[0]), False)
        source = Given(latents, FromPrior(noise, temperature))
        parameters = self.top_down(source, scope).parameters
        return self.render(parameters, seed, indices, tf.reduce_min(temperature))

    def render(self, parameters, seed=None, indices=None, temperature=1.0):
        """Turns parameters of the image distribution into images to look at.

        Args:
            parameters: Parameters of the image distribution, (batch, height, width, parameters).
            seed: Seed with which pixels that are not binary are drawn, two integers or one (see
                `sample`); default: no draw, but the distribution's `mean_image`.
            indices: Number of images, or the index of each, (batch,), which selects its part of the
                seed's noise; default: the size of the batch.
            temperature: Temperature at which pixels are drawn.

        Returns:
            Images (batch, height, width, channels) in [0, 1]; for binary images, always their means.
        """
        checks.check_parameters(parameters, self.image, self._num_image_parameters)
        distribution = self.image_distribution(parameters, temperature)
        if self.image.binary or seed is None:
            images = mean_image(distribution)
        else:
            seed = tf.random.experimental.stateless_fold_in(checks.as_seed(seed), PIXEL_STREAM)
            shape = (*self.image.shape[:2], distribution.num_uniform)
            indices = tf.shape(parameters)[0] if indices is None else indices
            images = distribution.from_uniform(stateless_random.uniform([shape], indices, seed)[0])
        return tf.clip_by_value(images, 0.0, 1.0)

    def image_distribution(self, parameters, temperature=1.0, likelihood: str | None = None):
        """p(x | z) over images in [0, 1], as a TFP distribution.

        Args:
            parameters: Parameters of the distribution, (batch, height, width, parameters).
            temperature: Temperature of samples from a logistic mixture.
            likelihood: Kind of probabilities of a logistic mixture, ``"official"`` or ``"exact"``;
                default: the property `likelihood`.
        """
        if self.image.binary:
            return bernoulli_image(parameters)
        if self.config.num_mixture_dec == 1:
            return NormalImage(parameters)
        return DiscretizedLogisticMixture(
            parameters,
            self.num_bits,
            temperature,
            self.config.min_log_scale,
            self.image.channels,
            exact=(likelihood or self.likelihood) == EXACT,
        )

    def log_likelihood(self, parameters, images, likelihood: str | None = None):
        """log p(x | z) of each image in nats, (batch,), over the scored centre of the image.

        With a normal decoder (``num_mixture_dec: 1``) it is the logarithm of a density on [-1, 1].

        Args:
            parameters: Parameters of the image distribution, (batch, height, width, parameters).
            images: As for `call`.
            likelihood: As for `image_distribution`.
        """
        parameters, images = self._scored(parameters, images)
        return self.image_distribution(parameters, likelihood=likelihood).log_prob(images)

    def pixel_log_likelihood(self, parameters, images):
        """log p(x | z) of each pixel of the scored centre in nats, (batch, height, width).

        Args:
            parameters: As for `log_likelihood`.
            images: As for `call`.
        """
        parameters, images = self._scored(parameters, images)
        return pixel_log_prob(self.image_distribution(parameters), images)

    def _scored(self, parameters, images):
        """The scored centre of parameters and images."""
        checks.check_parameters(parameters, self.image, self._num_image_parameters)
        checks.check_images(images, self.image)
        if not self.image.scored_size:
            return parameters, images
        rows, columns = self.image.scored_part
        return parameters[:, rows, columns], images[:, rows, columns]

    def bits_per_dim(self, nats):
        """Converts negative log-likelihoods in nats per image to bits per dimension (elementwise).

        For a normal decoder, the density times the distance between levels counts as the probability of
        a level. With 6 bits or more the standard deviation is at least half that distance, and the
        probabilities of all levels sum to at most 1.01. With fewer bits the sum may be larger, and the
        results cannot be compared with those of other decoders.
        """
        bits = self.image.bits_per_dim(nats)
        if not self.image.binary and self.config.num_mixture_dec == 1:
            bits += math.log2((2**self.num_bits - 1) / 2)
        return bits

    @property
    def num_bits(self) -> int:
        """Bits per value of the model's images, which are multiples of 1 / (2**num_bits - 1)."""
        return self.config.x_bits(self.image)

    @property
    def likelihood(self) -> str:
        """Kind of probabilities that a logistic mixture computes: ``"official"`` or ``"exact"``."""
        if self.config.likelihood != AUTO:
            return self.config.likelihood
        return OFFICIAL if has_official_likelihood(self.config, self.image) else EXACT

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(variable.shape.num_elements() for variable in self.trainable_variables)

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(height, width, latents) of each group's z, top of the hierarchy first."""
        return [group.latent_shape for group in self.groups]

    def draw_noise(self, indices, seed):
        """Draws standard-normal noise for every group.

        Args:
            indices: Number of images, or the index of each, (batch,). An image's noise depends only on
                the seed and its index.
            seed: Two integers, or one (see `sample`).

        Returns:
            Tensors (batch, height, width, latents), one per group.
        """
        checks.check_indices(indices)
        return stateless_random.normal(self.latent_shapes, indices, checks.as_seed(seed))

    def initialize_from_data(self, images, noise):
        """Data-dependent initialisation of the convolutions that ask for it (``res_elu`` only).

        Args:
            images: A batch as for `call`.
            noise: As for `call`.
        """
        checks.check_images(images, self.image)
        if self.needs_data_initialization:
            scope = Scope(data_initialization=True)
            self.top_down(FromPosterior(self.bottom_up(images, scope), noise), scope)

    @property
    def needs_data_initialization(self) -> bool:
        """Whether the model has convolutions that are initialised from data."""
        return any(layer.data_init for layer in self.convolutions)

    @property
    def convolutions(self) -> list[Conv2D]:
        """Every convolution of the model, in the order of `nvae_tf.engine.weights.walk`."""
        return [layer for _, layer in walk(self) if isinstance(layer, Conv2D)]

    @property
    def batch_norms(self) -> list[BatchNormAct]:
        """Every batch norm of the model, in the order of `nvae_tf.engine.weights.walk`."""
        return [layer for _, layer in walk(self) if isinstance(layer, BatchNormAct)]

    def get_config(self):
        """The constructor's arguments."""
        return {
            "config": dataclasses.asdict(self.config),
            "image": dataclasses.asdict(self.image),
            "precision": self.precision,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Builds a model from the result of `get_config`."""
        model_config, image = ModelConfig(**config["config"]), ImageSpec(**config["image"])
        return cls(model_config, image, config["precision"], name=config["name"])

    def save_own_variables(self, store):
        """Writes the stacks, and the names of their rows, to a ``.keras`` or ``.weights.h5`` file."""
        super().save_own_variables(store)
        store[ROW_NAMES] = np.frombuffer(self.row_names.serialize().encode(), np.uint8)

    def load_own_variables(self, store):
        """Reads the stacks from a ``.keras`` or ``.weights.h5`` file.

        Raises:
            ValueError: The file has no names of rows, or its rows belong to other weights
                (`OtherRowsError`).
        """
        if ROW_NAMES not in store:
            raise ValueError("it has no names of weights; expected a file of an NVAE")
        self.row_names.deserialize(np.asarray(store[ROW_NAMES]).tobytes())
        super().load_own_variables({key: store[key] for key in store if key != ROW_NAMES})

    def _noise_or_zeros(self, images, noise):
        if noise is None:
            return [tf.zeros((tf.shape(images)[0], *shape)) for shape in self.latent_shapes]
        return noise

    def _initial_state(self, batch_size, scope: Scope):
        """The learned map (batch, height, width, channels) that the walk starts from.

        None if there is only one group.
        """
        if self.top is None:
            return None
        top = tf.cast(scope.value(self.top), self.precision)
        return tf.tile(top[None], [batch_size, 1, 1, 1])

    @property
    def pixels_of_samples(self) -> str:
        """How `sample` obtains pixels from p(x | z), in words for a caption."""
        return "means of p(x | z)" if self.image.binary else "pixels drawn from p(x | z)"

    @property
    def _draws_pixels(self) -> bool:
        """Whether the temperature of `sample` applies to pixels as well as latents."""
        return not self.image.binary and self.config.num_mixture_dec > 1

    def _create_weights(self):
        """Creates all weights from the shapes of the maps, and the stacks that hold them."""
        self.top = None
        if len(self.groups) > 1:
            self.top = Weight(self.top_shape, Uniform(0.0, 1.0))
        create_chain([self.stem, *self.preprocess], self.image.channels)
        width = self.config.num_channels_enc * 2**self.config.num_preprocess_blocks
        for cells in self.encoder_tower:
            create_chain(cells, width)
            width = cells[-1].filters
        create_chain([self.encoder_top], width)
        start = self.top_shape[-1] if self.top is not None else 0
        create_chain([*self.decoder_tower, *self.postprocess, self.image_head], start)
        self.stacks = stack_weights(self)
        self.row_names = RowNames(layout(self))
        self.built = True


def model_digest(model: NVAE) -> str:
    """SHA-256 of a model's configuration, names of weights and weights, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    parts = [dataclasses.asdict(model.config), dataclasses.asdict(model.image)]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    digest.update(model.row_names.serialize().encode())
    for stack in model.stacks:
        digest.update(np.ascontiguousarray(stack.numpy(), "<f4").tobytes())
    return digest.hexdigest()

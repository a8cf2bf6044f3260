"""One step of training and one of validation: the model, its objective and its optimiser.

Both run on every replica. Losses, KL-balancing coefficients, gradients and logged values are averaged
over the global batch, so every replica computes the same update and applies it to its local copy of the
variables.
"""

import contextlib
from typing import NamedTuple

import tensorflow as tf

from nvae_tf import objective
from nvae_tf.config import BUILT_IN_OPTIMIZERS, TrainConfig
from nvae_tf.engine.devices import local_variable, mean_over_replicas, num_replicas
from nvae_tf.engine.kernels import WARM_UP_ITERATIONS, SpectralNorms
from nvae_tf.engine.scope import BatchStatistics, Scope
from nvae_tf.engine.weights import by_stack, layout, rows_of, stacked, walk, weights_below
from nvae_tf.layers.batch_norm import update_running_averages
from nvae_tf.model import NVAE, NVAEOutput
from nvae_tf.training.optimizers import MovingAverage, Optimizer

VALIDATION_STREAM = 2**31 - 1  # of noise; training's streams are numbered by the step

# Loss scaling for float16, as in the official implementation.
FIRST_LOSS_SCALE, SCALE_GROWTH_STEPS = 2.0**10, 2000


class Losses(NamedTuple):
    """The terms of the objective in one pass, in nats; scalars unless a shape is given.

    Attributes:
        loss: What is minimised: mean(recon + beta * balanced KL) + lambda * (spectral + batch norm).
        recon: -log p(x | z), (batch,).
        kl_per_group: KL of each image and group, (batch, groups), coarsest group first.
        balanced_kl: Sum over groups of gamma * KL, (batch,).
        gamma: Balancing coefficients, (groups,).
        spectral: Sum of the kernels' spectral norms.
        batch_norm: Sum over batch norms of the largest |gamma|.
    """

    loss: tf.Tensor
    recon: tf.Tensor
    kl_per_group: tf.Tensor
    balanced_kl: tf.Tensor
    gamma: tf.Tensor
    spectral: tf.Tensor
    batch_norm: tf.Tensor


class PassResult(NamedTuple):
    """What one training-mode pass computed.

    Attributes:
        losses: The objective's terms.
        channel_kl: KL of every latent channel in nats, mean over the batch, (groups, latents).
        gradients: Gradients with respect to the model's trainable variables.
        statistics: Statistics of the batch, in the order of `Trainer.batch_norms`.
        vectors: Iterated singular vectors.
    """

    losses: Losses
    channel_kl: tf.Tensor
    gradients: list[tf.Tensor]
    statistics: list[BatchStatistics]
    vectors: list[tf.Tensor]


class Trainer(tf.Module):
    """Everything that training changes, and how one step changes it.

    Whatever varies during training (annealing, noise, schedules) is a function of the optimiser's step
    count, so a resumed run continues as if it had never stopped.

    Args:
        model: The NVAE to train.
        config: Objective and schedule.
        total_steps: Steps of the whole training.
        steps_per_epoch: After how many steps the reported means start anew.
        seed: Seed of the noise.
        optimizer: Changes the weights; None for passes without updates.

    Attributes:
        weights: The model's trainable variables: stacks of weights.
        batch_norms: The model's batch norms.
        spectral: The singular vectors of its kernels.
        averages: Moving averages of the weights, or None.
        skipped: Steps skipped so far.
        consecutive_skips: Steps skipped in a row, up to the latest one.
        first_skip_causes: What was not finite in the first of those: recon, spectral term, batch-norm
            term, gradient, and each group's KL.
        loss_scale: Factor on the loss, for float16.
        steps_since_overflow: Finite steps since the loss scale changed.
    """

    def __init__(
        self,
        model: NVAE,
        config: TrainConfig,
        total_steps: int,
        steps_per_epoch: int = 1,
        seed: int = 0,
        optimizer: Optimizer | None = None,
    ):
        super().__init__()
        self.model, self.config, self.optimizer = model, config, optimizer
        self.total_steps, self.steps_per_epoch, self.seed = total_steps, steps_per_epoch, seed
        self.alphas = objective.balancing_weights(model.config)
        self.spectral = SpectralNorms(model.convolutions)
        self.batch_norms = model.batch_norms
        self.weights = model.trainable_variables
        if optimizer:
            optimizer.build(self.weights)
        self.averages = MovingAverage(self.weights, config.ema_decay) if config.ema_decay else None
        # Sums over the steps of the epoch so far that were not skipped: recon, KL, number of steps.
        self.epoch_sums = tf.Variable(tf.zeros(3, tf.float64), trainable=False)
        self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.consecutive_skips = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.first_skip_causes = tf.Variable(
            tf.zeros(4 + len(model.groups), tf.bool), trainable=False
        )
        self.loss_scale = tf.Variable(FIRST_LOSS_SCALE, trainable=False)
        self.steps_since_overflow = tf.Variable(0, dtype=tf.int64, trainable=False)

    def prepare(self, images):
        """Does what a new training needs once before its first step, beyond drawing the weights.

        Args:
            images: A batch for data-dependent initialisation; unused unless the model asks for it.
        """
        if self.model.needs_data_initialization:
            noise = self.model.draw_noise(len(images), (self.seed, 0))
            self.model.initialize_from_data(images, noise)
        self.warm_up_spectral_norms()

    def layout(self) -> dict[str, list[list[str]]]:
        """The names of the rows of all stacks that a checkpoint holds, by kind of stack."""
        names = {content: path for path, content in walk(self.model)}
        return {"weights": layout(self.model), "convolutions": self.spectral.layout(names)}

    @property
    def skipped_in_row(self) -> int:
        """How many of the latest steps were skipped, one after the other; outside of steps."""
        return int(self.consecutive_skips.numpy())

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row were skipped that training has ended; outside of steps."""
        return self.skipped_in_row >= self.config.max_bad_steps

    def forget_bad_steps(self) -> None:
        """Starts the count of skipped steps in a row anew, for a run that is continued.

        The count of good steps in a row stays: the loss scale of an uninterrupted run follows it.
        """
        self.consecutive_skips.assign(0)
        self.first_skip_causes.assign(tf.zeros_like(self.first_skip_causes))

    @contextlib.contextmanager
    def evaluated_weights(self):
        """Gives the model its moving averages as weights, if there are any, until the block ends.

        Evaluation uses the averages, so pictures should too.
        """
        if not self.averages:
            yield
            return
        before = [tf.identity(stack) for stack in self.weights]
        _assign(self.weights, self.averages.stacks)
        try:
            yield
        finally:
            _assign(self.weights, before)

    def warm_up_spectral_norms(self):
        """Brings fresh singular vectors near those of the kernels."""
        _, _, vectors = self.spectral.normalized_kernels({}, False, WARM_UP_ITERATIONS)
        self.spectral.update_vectors(vectors)

    def losses_and_gradients(
        self, images, noise, beta, regularization, loss_scale=None, weights=None
    ) -> PassResult:
        """One training-mode pass, which changes nothing.

        Args:
            images: (batch, height, width, channels) in [0, 1].
            noise: As for `NVAE.call`.
            beta: The KL coefficient.
            regularization: lambda.
            loss_scale: Factor on the loss while gradients are computed; None for 1.
            weights: Tensors in the place of the model's trainable variables; default: their values.
        """
        if weights is None:
            weights = [stack.read_value() for stack in self.weights]
        tensors = self._by_reference(weights)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            spectral, kernels, vectors = self.spectral.normalized_kernels(
                tensors, self._compiles_regions
            )
            scope = Scope(
                training=True,
                values=rows_of(weights_below(self.model), tensors),
                kernels=kernels,
                rematerialize=self.config.gradient_checkpointing,
                functions={} if num_replicas() == 1 else None,
                xla_regions=self._compiles_regions,
                custom_gradients=True,
            )
            output = self.model.autoencode(images, noise, scope)
            batch_norm = objective.batch_norm_penalty(self._gammas(tensors))
            losses = self._losses(output, images, beta, regularization, spectral, batch_norm)
            scaled = losses.loss * (1.0 if loss_scale is None else loss_scale)
        gradients = tape.gradient(scaled, weights)
        if loss_scale is not None:
            gradients = [gradient / loss_scale for gradient in gradients]
        statistics = [scope.statistics[norm] for norm in self.batch_norms]
        return PassResult(losses, _channel_kl(output), gradients, statistics, vectors)

    def _by_reference(self, tensors) -> dict:
        """Tensors that stand for the model's trainable variables, by those."""
        return {stack.ref(): tensor for stack, tensor in zip(self.weights, tensors, strict=True)}

    def _gammas(self, tensors) -> list[tf.Tensor]:
        """The scales of all batch norms: of those of one width one tensor (n, channels)."""
        gammas = by_stack({norm.gamma: norm.gamma for norm in self.batch_norms})
        return [stacked(list(rows.values()), tensors) for _, rows in gammas]

    @property
    def _compiles_regions(self):
        """Whether regions of a step are compiled, on a CPU with ``jit_compile: auto``."""
        return (
            self.config.jit_compile == "auto" and not uses_xla(self.config) and num_replicas() == 1
        )

    def _losses(
        self, output: NVAEOutput, images, beta, regularization, spectral, batch_norm
    ) -> Losses:
        recon = -self.model.log_likelihood(output.parameters, images)
        kl_per_group = output.kl_per_group
        balanced_kl, gamma = objective.balance_kl(
            kl_per_group, self.alphas, beta, lambda kl: mean_over_replicas(tf.reduce_mean(kl, 0))
        )
        loss = tf.reduce_mean(recon + beta * balanced_kl)
        loss += regularization * (spectral + batch_norm)
        return Losses(loss, recon, kl_per_group, balanced_kl, gamma, spectral, batch_norm)

    def update_state(self, result: PassResult, condition=True) -> None:
        """Moves running averages and singular vectors to where a pass brought them."""
        by_norm = dict(zip(self.batch_norms, result.statistics, strict=True))
        update_running_averages(by_norm, condition)
        self.spectral.update_vectors(result.vectors, condition)

    def train_step(self, images):
        """One step on this replica.

        Args:
            images: This replica's images, (accumulate_steps * batch_size, height, width, channels).

        Returns:
            What may be reported, identical on all replicas. Scalars ``nelbo``, ``bpd``, ``recon`` and
            ``kl`` are means over the steps of the epoch so far that were not skipped (NaN if all were);
            all others are of this step. Names that end in ``_per_group`` are vectors, coarsest group
            first.
        """
        config, step = self.config, self.optimizer.iterations.read_value()
        beta = objective.kl_coefficient(step, self.total_steps, config)
        regularization = objective.regularization_coefficient(beta, config)
        scaling = config.precision == "mixed_float16"
        loss_scale = self.loss_scale.read_value() if scaling else None
        rate = self.optimizer.learning_rate

        found = self._accumulate(images, step, beta, regularization, loss_scale)
        gradients = mean_over_replicas(found.gradients)
        loss, recon, channel_kl = mean_over_replicas(
            [found.losses.loss, tf.reduce_mean(found.losses.recon), found.channel_kl]
        )
        kl_per_group = tf.reduce_sum(channel_kl, 1)

        # A step that is not finite, or too large, changes nothing but the counters.
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        good = finite & (norm <= config.skip_gradient_norm if config.skip_gradient_norm else True)
        ended = self.consecutive_skips >= config.max_bad_steps
        apply = good & ~ended
        self._record_skips(
            good, ended, [recon, found.losses.spectral, found.losses.batch_norm, norm], kl_per_group
        )
        if scaling:
            self._adapt_loss_scale(finite)
        if config.clip_gradient_norm:
            factor = config.clip_gradient_norm / tf.maximum(norm, config.clip_gradient_norm)
            gradients = [gradient * factor for gradient in gradients]
        self.optimizer.apply_gradients(gradients, apply, self._compiles_regions)
        if self.averages:
            self.averages.update(step + 1, apply, self._compiles_regions)
        self.update_state(found, apply)

        return {
            **self._epoch_means(step, recon, tf.reduce_sum(kl_per_group), apply),
            **_group_report(channel_kl),
            "loss": loss,
            "beta": beta,
            "lambda": regularization,
            "learning_rate": rate,
            "spectral_loss": found.losses.spectral,
            "batch_norm_loss": found.losses.batch_norm,
            "gradient_norm": norm,
            "skipped_steps": self.skipped.read_value(),
            "loss_scale": loss_scale if scaling else tf.ones(()),
            "gamma_per_group": found.losses.gamma,
        }

    def _accumulate(self, images, step, beta, regularization, loss_scale) -> PassResult:
        """The mean of the passes that make one step, which run one after the other."""
        passes, size = self.config.accumulate_steps, tf.shape(images)[0]
        size = size // passes
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int32)
        seed = tf.stack([self.seed, tf.cast(step, tf.int32)])

        def one(number):
            part = images[number * size : (number + 1) * size] if passes > 1 else images
            # The place of each image in the global batch: noise does not depend on the replicas.
            places = (replica * passes + number) * size + tf.range(size)
            noise = self.model.draw_noise(places, seed)
            found = self.losses_and_gradients(part, noise, beta, regularization, loss_scale)
            losses = found.losses._replace(
                **{
                    name: tf.reduce_mean(getattr(found.losses, name), 0)
                    for name in ("recon", "kl_per_group", "balanced_kl")
                }
            )
            return found._replace(losses=losses)

        if passes == 1:
            return one(0)

        def add(number, total):
            return number + 1, tf.nest.map_structure(tf.add, total, one(number))

        _, total = tf.while_loop(
            lambda *_: True, add, (0, self._zero_pass()),
            maximum_iterations=passes, parallel_iterations=1,
        )  # fmt: skip
        return tf.nest.map_structure(lambda value: value / passes, total)

    def _zero_pass(self) -> PassResult:
        """Zeros shaped as the mean of a pass over its images, for sums of passes."""
        groups = tf.zeros(len(self.model.groups))
        losses = Losses(**dict.fromkeys(Losses._fields, tf.zeros(())))
        channel_kl = tf.zeros((len(self.model.groups), self.model.config.num_latent_per_group))
        shapes = [norm.moving_mean.shape for norm in self.batch_norms]
        statistics = [BatchStatistics(tf.zeros(s), tf.zeros(s), tf.zeros(1)) for s in shapes]
        return PassResult(
            losses._replace(kl_per_group=groups, gamma=groups),
            channel_kl,
            [tf.zeros(stack.shape) for stack in self.weights],
            statistics,
            [tf.zeros(vectors.shape) for vectors in self.spectral.vectors],
        )

    def _record_skips(self, good, ended, terms, kl_per_group):
        """Counts skipped steps, and records what was not finite at the start of a row of them."""
        bad_before = self.consecutive_skips.read_value()
        infinite = ~tf.math.is_finite(tf.concat([tf.stack(terms), kl_per_group], 0))
        starts = ~good & tf.equal(bad_before, 0)
        local_variable(self.first_skip_causes).assign(
            tf.where(starts, infinite, self.first_skip_causes)
        )
        row = tf.where(good, tf.zeros_like(bad_before), bad_before + 1)
        local_variable(self.consecutive_skips).assign(tf.where(ended, bad_before, row))
        local_variable(self.skipped).assign_add(tf.cast(~good, tf.int64))

    def _adapt_loss_scale(self, finite):
        good = tf.where(finite, self.steps_since_overflow + 1, 0)
        grows = good >= SCALE_GROWTH_STEPS
        factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
        local_variable(self.loss_scale).assign(tf.maximum(self.loss_scale * factor, 1.0))
        local_variable(self.steps_since_overflow).assign(tf.where(grows, tf.zeros_like(good), good))

    def _epoch_means(self, step, recon, kl, applied):
        """Means over the steps of this epoch that were not skipped; NaN while there is none."""
        starts = tf.equal(step % self.steps_per_epoch, 0)
        before = tf.where(starts, tf.zeros_like(self.epoch_sums), self.epoch_sums)
        values = tf.cast(tf.stack([recon, kl, tf.ones(())]), tf.float64)
        sums = before + tf.where(applied, values, tf.zeros_like(values))
        local_variable(self.epoch_sums).assign(sums)
        recon, kl = tf.unstack(tf.cast(sums[:2] / sums[2], tf.float32))
        return self._summary(recon, kl)

    def _summary(self, recon, kl):
        bits = self.model.bits_per_dim(recon + kl)
        return {"nelbo": recon + kl, "bpd": bits, "recon": recon, "kl": kl}

    def validation_step(self, images, indices, weights):
        """NELBO of images (beta 1, no balancing), in evaluation mode, on this replica.

        It is computed with the moving averages of the weights, if there are any.

        Args:
            images: (batch, height, width, channels).
            indices: Index of each image in its data set, (batch,): its noise depends on nothing else.
            weights: 1 for images that count, 0 for those that only fill a batch, (batch,).

        Returns:
            Sums over the images of all replicas: their number, recon, and KL of every latent channel
            (groups, latents).
        """
        noise = self.model.draw_noise(indices, (self.seed, VALIDATION_STREAM))
        tensors = {stack.ref(): tf.convert_to_tensor(stack) for stack in self.model.stacks}
        if self.averages:
            tensors.update(self._by_reference(self.averages.stacks))
        scope = Scope(values=rows_of(weights_below(self.model), tensors))
        output = self.model.autoencode(images, noise, scope)
        recon = -self.model.log_likelihood(output.parameters, images)
        sums = [
            tf.reduce_sum(weights),
            tf.reduce_sum(weights * recon),
            _channel_kl(output, weights),
        ]
        if num_replicas() == 1:
            return sums
        return tf.distribute.get_replica_context().all_reduce("SUM", sums)

    def validate(self, run_step, batches, stop=lambda: False) -> dict[str, tf.Tensor] | None:
        """Mean NELBO and its parts over a data set.

        Args:
            run_step: The compiled `validation_step`.
            batches: Batches of (images, indices, weights) that hold every image once.
            stop: Asked after every batch; True ends the validation.

        Returns:
            What `train_step` reports, for the data set; None if validation was stopped.
        """
        of_batches = []
        for batch in batches:
            of_batches.append(run_step(*batch))
            if stop():
                return None
        count, recon, channel_kl = (tf.add_n(sums) for sums in zip(*of_batches, strict=True))
        channel_kl = channel_kl / count
        return {
            **self._summary(recon / count, tf.reduce_sum(channel_kl)),
            **_group_report(channel_kl),
        }


def _assign(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def uses_xla(config: TrainConfig) -> bool:
    """Whether whole steps are compiled with XLA: `jit_compile`, where ``auto`` means on GPUs.

    Never with an optimiser of TensorFlow Addons on several replicas, whose updates exchange values
    outside of the compiled step.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if config.optimizer not in BUILT_IN_OPTIMIZERS and replicas > 1:
        return False
    auto = bool(tf.config.list_physical_devices("GPU"))
    return {"auto": auto, "on": True, "off": False}[config.jit_compile]


def compiled(function, strategy, jit: bool):
    """A function that runs on every replica, with results that are identical on all, taken from one.

    Args:
        function: A function of tensors.
        strategy: Strategy over the replicas.
        jit: Compile with XLA, collectives included.
    """
    # Nothing in a step needs AutoGraph, and tracing takes two thirds of the time without it.
    inner = tf.function(function, autograph=False, jit_compile=True) if jit else function

    @tf.function(autograph=False)
    def run(*arguments):
        found = strategy.run(inner, arguments)
        return tf.nest.map_structure(lambda v: strategy.experimental_local_results(v)[0], found)

    return run


def several_steps(function, strategy, jit: bool):
    """A function that takes several steps in a row, on every replica, in one call.

    For replicas that exchange values: TensorFlow keeps a record of some 1.6 KB for each exchange in
    each call of a graph, for the life of the process. The steps of one call share their records, so
    that memory grows with the calls and not with the steps.

    Args:
        function: A step, of one batch, with results that are identical on all replicas.
        strategy: Strategy over the replicas.
        jit: Compile the step with XLA, collectives included.

    Returns:
        A function of an iterator over batches and the number of steps, to the last step's results.
    """
    inner = tf.function(function, autograph=False, jit_compile=True) if jit else function
    structure = None  # of a step's results, known once one is traced

    def step(number, batches):
        nonlocal structure
        results = strategy.run(inner, (next(batches),))
        structure = tf.nest.map_structure(
            lambda value: strategy.experimental_local_results(value)[0], results
        )
        flat = [tf.reshape(tf.cast(v, tf.float64), [-1]) for v in tf.nest.flatten(structure)]
        return number + 1, tf.concat(flat, 0)

    @tf.function(autograph=False)
    def run(batches, count):
        _, flat = tf.while_loop(
            lambda number, _: number < count,
            lambda number, _: step(number, batches),
            (0, tf.zeros(0, tf.float64)),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([None])),
            parallel_iterations=1,
        )
        specs = tf.nest.flatten(structure)
        parts = tf.split(flat, [spec.shape.num_elements() for spec in specs])
        values = [
            tf.cast(tf.reshape(part, spec.shape), spec.dtype)
            for part, spec in zip(parts, specs, strict=True)
        ]
        return tf.nest.pack_sequence_as(structure, values)

    return run


@contextlib.contextmanager
def grappler_disabled():
    """Switches Grappler off on CPUs, so that TensorFlow runs graphs as they were traced.

    Rewriting takes longer than several steps of a deep model and does not make them faster; and with
    gradient checkpointing it rounds differently than without. GPUs keep it, for memory layouts.
    """
    option = "disable_meta_optimizer"
    before = tf.config.optimizer.get_experimental_options().get(option, False)
    if not tf.config.list_physical_devices("GPU"):
        tf.config.optimizer.set_experimental_options({option: True})
    try:
        yield
    finally:
        tf.config.optimizer.set_experimental_options({option: before})


def _channel_kl(output: NVAEOutput, weights=None):
    """KL of every latent channel in nats, (groups, latents): mean over the batch, or weighted sum."""
    per_image = tf.stack([tf.reduce_sum(latent.kl, [1, 2]) for latent in output.latents], 1)
    if weights is None:
        return tf.reduce_mean(per_image, 0)
    return tf.tensordot(weights, per_image, 1)


def _group_report(channel_kl):
    active = objective.active_latents(channel_kl)
    return {
        "kl_per_group": tf.reduce_sum(channel_kl, 1),
        "active_latents_per_group": active,
        "active_latents": tf.reduce_sum(active),
    }

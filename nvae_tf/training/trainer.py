"""One step of training and one of validation: the model, its objective and its optimiser.

Both run on every replica. Losses, KL-balancing coefficients, gradients and logged values are averaged
over the global batch, so every replica computes the same update and applies it to its local copy of the
variables.
"""

import contextlib
from typing import NamedTuple

import tensorflow as tf

from nvae_tf import objective
from nvae_tf.config import AUTO, BUILT_IN_OPTIMIZERS, TrainConfig
from nvae_tf.engine.devices import gpu_found
from nvae_tf.engine.kernels import WARM_UP_ITERATIONS, SpectralNorms
from nvae_tf.engine.replicas import (
    mean_over_replicas,
    num_replicas,
    replica_index,
    replica_row,
    sum_over_replicas,
)
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import SharedFunctions
from nvae_tf.engine.state import TensorState, VariableState
from nvae_tf.engine.weights import RowNames, by_stack, rows_of, stacked, walk, weights_below
from nvae_tf.layers.batch_norm import update_running_averages
from nvae_tf.layers.latent_group import FromPosterior
from nvae_tf.model import NVAE, NVAEOutput
from nvae_tf.training.norm_bound import GradientNormBound
from nvae_tf.training.optimizers import MovingAverage, Optimizer

VALIDATION_STREAM = 2**31 - 1  # of noise; training's streams are numbered by the step

# Loss scaling for float16, as in the official implementation.
FIRST_LOSS_SCALE, SCALE_GROWTH_STEPS = 2.0**10, 2000


class Losses(NamedTuple):
    """The terms of the objective in one pass, in nats; scalars unless a shape is given.

    `Trainer.compute_pass` replaces values per image by their means over this replica's images.

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
    """The result of one training-mode pass on one replica.

    Attributes:
        losses: The terms of the objective.
        channel_kl: KL of every latent channel in nats, mean over the images, (groups, latents).
        gradients: Gradients with respect to `Trainer.weights`.
        statistics: Batch statistics over all replicas as vectors (`BatchStatistics`), in the order of
            `Trainer.batch_norms`.
        vectors: Iterated singular vectors, in the order of `SpectralNorms.vectors`.
    """

    losses: Losses
    channel_kl: tf.Tensor
    gradients: list[tf.Tensor]
    statistics: list[tf.Tensor]
    vectors: list[tf.Tensor]


class Trainer(tf.Module):
    """Everything that training changes, and how one step changes it. Create it in the strategy's scope.

    All that varies during training (annealing, noise, schedules) is a function of the optimiser's step
    count, so that a resumed run continues as if it had never stopped.

    Args:
        model: The NVAE to train.
        config: Objective and schedule.
        total_steps: Number of steps of the whole training.
        steps_per_epoch: Number of steps after which the reported means are reset.
        seed: Seed of the noise.
        optimizer: The optimiser, not built yet.
        on_gpu: Whether steps are traced for a GPU; default: whether TensorFlow finds one.

    Attributes:
        weights: The model's trainable variables, which are stacks of weights.
        batch_norms: The model's batch norms.
        spectral: The singular vectors of the model's kernels.
        kernel_names: The names of the kernels that the rows of `spectral` belong to, for checkpoints.
        averages: Moving averages of the weights, or None.
        norm_bound: The running bound of ``skip_gradient_norm: auto``, or None.
        epoch_sums: Sums over this epoch's steps that were not skipped: recon, KL, number of steps.
        skipped: Number of steps skipped so far.
        consecutive_skips: Number of steps skipped in a row, up to the latest step.
        first_skip_causes: Which terms were not finite in the first step of that row: recon, spectral
            term, batch-norm term, gradient, and each group's KL, bool (4 + groups,).
        loss_scale: Factor on the loss, for float16.
        steps_since_overflow: Number of finite steps since the loss scale changed.
        functions: The functions that identical blocks share in training.
    """

    def __init__(
        self,
        model: NVAE,
        config: TrainConfig,
        total_steps: int,
        steps_per_epoch: int = 1,
        seed: int = 0,
        *,
        optimizer: Optimizer,
        on_gpu: bool | None = None,
    ):
        super().__init__()
        self.on_gpu = gpu_found() if on_gpu is None else on_gpu
        self._num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self.model, self.config, self.optimizer = model, config, optimizer
        self.total_steps, self.steps_per_epoch, self.seed = total_steps, steps_per_epoch, seed
        self.alphas = objective.balancing_weights(model.config)
        self.spectral = SpectralNorms(model.convolutions)
        names = {content: path for path, content in walk(model)}
        self.kernel_names = RowNames(self.spectral.layout(names))
        self.batch_norms = model.batch_norms
        self.weights = model.trainable_variables
        optimizer.build(self.weights)
        self.averages = MovingAverage(self.weights, config.ema_decay) if config.ema_decay else None
        self.norm_bound = GradientNormBound() if config.skip_gradient_norm == AUTO else None
        self.epoch_sums = tf.Variable(tf.zeros(3, tf.float64), trainable=False)
        self.skipped = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.consecutive_skips = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.first_skip_causes = tf.Variable(
            tf.zeros(4 + len(model.groups), tf.bool), trainable=False
        )
        self.loss_scale = tf.Variable(FIRST_LOSS_SCALE, trainable=False)
        self.steps_since_overflow = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.functions = SharedFunctions()

    def prepare(self, images):
        """Initialises a new training: weights that depend on data, and singular vectors.

        Args:
            images: Batch (batch, height, width, channels) for data-dependent initialisation; unused
                unless the model asks for it.
        """
        if self.model.needs_data_initialization:
            noise = self.model.draw_noise(len(images), (self.seed, 0))
            self.model.initialize_from_data(images, noise)
        self.warm_up_spectral_norms()

    @property
    def diverged(self) -> bool:
        """Whether ``max_bad_steps`` steps in a row were skipped, which ends training."""
        return int(self.consecutive_skips.numpy()) >= self.config.max_bad_steps

    def forget_bad_steps(self) -> None:
        """Resets the count of consecutive skips, for a run that is continued.

        `steps_since_overflow` stays, so that the loss scale changes as in an uninterrupted run.
        """
        self.consecutive_skips.assign(0)
        self.first_skip_causes.assign(tf.zeros_like(self.first_skip_causes))

    @contextlib.contextmanager
    def averaged_weights(self):
        """Replaces the model's weights by their moving averages, if there are any, in a block."""
        if not self.averages:
            yield
            return
        before = [tf.identity(stack) for stack in self.weights]
        _assign(self.weights, self.averages.values())
        try:
            yield
        finally:
            _assign(self.weights, before)

    def warm_up_spectral_norms(self):
        """Iterates freshly drawn singular vectors until they are close to those of the kernels."""
        _, _, vectors = self.spectral.normalized_kernels({}, False, WARM_UP_ITERATIONS)
        self.spectral.update_vectors(vectors)

    def losses_and_gradients(
        self, images, noise, beta, regularization, loss_scale=None, state=None
    ) -> PassResult:
        """One training-mode pass, which changes nothing.

        Args:
            images: (batch, height, width, channels) in [0, 1].
            noise: As for `NVAE.call`.
            beta: The KL coefficient, a scalar.
            regularization: lambda, a scalar.
            loss_scale: Factor on the loss while gradients are computed, which are divided by it
                afterwards; None for 1.
            state: Where weights and singular vectors are read (`nvae_tf.engine.state`); default: from
                their variables.
        """
        state = state or VariableState()
        weights = [state.value(stack) for stack in self.weights]
        tensors = self._by_reference(weights)
        with tf.GradientTape() as tape:
            tape.watch(weights)
            spectral, kernels, vectors = self.spectral.normalized_kernels(
                tensors, self._xla_regions, state=state
            )
            scope = Scope(
                training=True,
                values=rows_of(weights_below(self.model), tensors),
                kernels=kernels,
                replica_row=replica_row(),
                rematerialize=self.config.gradient_checkpointing,
                functions=self.functions,
                xla_regions=self._xla_regions,
                xla_step=self.xla_steps,
                custom_gradients=True,
                on_gpu=self.on_gpu,
            )
            encoded = self.model.bottom_up(images, scope)
            output = self.model.top_down(FromPosterior(encoded, noise), scope)
            recon = -self.model.log_likelihood(output.parameters, images)
            kl_per_group = output.kl_per_group
            mean_kl = mean_over_replicas(tf.reduce_mean(tf.abs(kl_per_group), 0))
            balanced_kl, gamma = objective.balance_kl(
                kl_per_group, mean_kl, self.alphas, beta / self.config.kl_max_coeff
            )
            batch_norm = objective.batch_norm_penalty(self._batch_norm_scales(tensors))
            loss = tf.reduce_mean(recon + beta * balanced_kl)
            loss += regularization * (spectral + batch_norm)
            scaled = loss * (1.0 if loss_scale is None else loss_scale)
        # The gradient with respect to a stack from which rows were gathered is an IndexedSlices.
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(scaled, weights)]
        if loss_scale is not None:
            gradients = [gradient / loss_scale for gradient in gradients]
        statistics = [scope.statistics[norm] for norm in self.batch_norms]
        losses = Losses(loss, recon, kl_per_group, balanced_kl, gamma, spectral, batch_norm)
        return PassResult(losses, _channel_kl(output), gradients, statistics, vectors)

    def _by_reference(self, tensors) -> dict:
        """Dictionary from each trainable variable's reference to the tensor used in its place."""
        return {stack.ref(): tensor for stack, tensor in zip(self.weights, tensors, strict=True)}

    def _batch_norm_scales(self, tensors) -> list[tf.Tensor]:
        """The scales of all batch norms: for each width, one tensor (n, channels)."""
        gammas = by_stack({norm.gamma: norm.gamma for norm in self.batch_norms})
        return [stacked(list(rows.values()), tensors) for _, rows in gammas]

    @property
    def xla_steps(self) -> bool:
        """Whether whole steps are compiled with XLA, as ``jit_compile`` says.

        ``auto`` compiles whole steps on a single GPU only. With several replicas a step holds exchanges
        between them, which are compiled only with ``on``, and never with an optimiser of Keras or
        TensorFlow Addons, whose updates exchange values outside of the compiled step.
        """
        several = self._num_replicas > 1
        if self.config.optimizer not in BUILT_IN_OPTIMIZERS and several:
            return False
        auto = self.on_gpu and not several
        return {"auto": auto, "on": True, "parts": False, "off": False}[self.config.jit_compile]

    @property
    def _xla_regions(self) -> bool:
        """Whether regions of a step are compiled: ``parts``, or ``auto`` without whole steps."""
        return self.config.jit_compile in ("auto", "parts") and not self.xla_steps

    def update_state(self, result: PassResult, condition=True, state=None) -> None:
        """Updates the running averages of batch norms and the singular vectors from a pass.

        Args:
            result: The result of the pass.
            condition: A boolean scalar; if it is false, nothing changes.
            state: Where they are read and written (`nvae_tf.engine.state`); default: in their
                variables.
        """
        by_norm = dict(zip(self.batch_norms, result.statistics, strict=True))
        update_running_averages(by_norm, condition, state)
        self.spectral.update_vectors(result.vectors, condition, state)

    def one_pass_step(self, images):
        """Takes a step that consists of one pass, on this replica.

        Args:
            images: As for `compute_pass`.

        Returns:
            As for `update`.
        """
        return self.update(self.compute_pass(images))

    def compute_pass(self, images, number=0, state=None) -> PassResult:
        """Computes one of the ``accumulate_steps`` passes of a step, on this replica.

        Args:
            images: This replica's images of the whole step, (accumulate_steps * batch_size, height,
                width, channels), those of the first pass first.
            number: Index of the pass, from 0.
            state: As for `losses_and_gradients`.

        Returns:
            The result of the pass, with losses averaged over this replica's images.
        """
        state, passes = state or VariableState(), self.config.accumulate_steps
        step = state.value(self.optimizer.iterations)
        beta, regularization = self._coefficients(step)
        if passes > 1:
            size = tf.shape(images)[0] // passes
            images = images[number * size : (number + 1) * size]
        # An image's noise depends on its place in the global batch, not on the number of replicas.
        size = tf.shape(images)[0]
        places = (number * num_replicas() + replica_index()) * size + tf.range(size)
        noise = self.model.draw_noise(places, tf.stack([self.seed, tf.cast(step, tf.int32)]))
        loss_scale = state.value(self.loss_scale) if self._scales_loss else None
        result = self.losses_and_gradients(images, noise, beta, regularization, loss_scale, state)
        losses = result.losses._replace(
            **{
                name: tf.reduce_mean(getattr(result.losses, name), 0)
                for name in ("recon", "kl_per_group", "balanced_kl")
            }
        )
        return result._replace(losses=losses)

    def add_pass(self, total: PassResult, images, number, state=None) -> PassResult:
        """Computes a pass and adds it to a sum of passes; other arguments as for `compute_pass`."""
        return tf.nest.map_structure(tf.add, total, self.compute_pass(images, number, state))

    def update(self, total: PassResult, state=None):
        """Completes a step on this replica: changes weights, averages, statistics and counters.

        Args:
            total: The sum of the results of the step's passes.
            state: Where everything is read and written (`nvae_tf.engine.state`); default: in the
                variables.

        Returns:
            Dictionary of values to report, identical on all replicas. ``nelbo``, ``bpd``, ``recon`` and
            ``kl`` are means over the epoch's steps so far that were not skipped (NaN if all were); all
            others belong to this step alone. Names that end in ``_per_group`` are vectors, coarsest
            group first; all others are scalars.
        """
        config, state = self.config, state or VariableState()
        passes = config.accumulate_steps
        result = tf.nest.map_structure(lambda v: v / passes, total) if passes > 1 else total
        step = state.value(self.optimizer.iterations)
        beta, regularization = self._coefficients(step)
        rate = self.optimizer.learning_rate_after(step)
        loss_scale = state.value(self.loss_scale)
        losses = result.losses

        gradients, (loss, recon, channel_kl) = mean_over_replicas(
            (result.gradients, (losses.loss, losses.recon, result.channel_kl))
        )
        kl_per_group = tf.reduce_sum(channel_kl, 1)

        # A step whose loss or gradient is not finite, or whose gradient is too large, only counts.
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        good = finite
        if self.norm_bound:
            good &= self.norm_bound.allows(norm, state)
            self.norm_bound.update(norm, finite, state)
        elif config.skip_gradient_norm:
            good &= norm <= config.skip_gradient_norm
        diverged = state.value(self.consecutive_skips) >= config.max_bad_steps
        apply = good & ~diverged
        terms = [recon, losses.spectral, losses.batch_norm, norm]
        self._record_skips(good, diverged, terms, kl_per_group, state)
        if self._scales_loss:
            self._adapt_loss_scale(finite, state)
        if config.clip_gradient_norm:
            factor = config.clip_gradient_norm / tf.maximum(norm, config.clip_gradient_norm)
            gradients = [gradient * factor for gradient in gradients]
        scope = Scope(functions=self.functions, xla_regions=self._xla_regions)
        self.optimizer.apply_gradients(gradients, apply, scope, state)
        if self.averages:
            self.averages.update(step + 1, apply, scope, state)
        self.update_state(result, apply, state)

        return {
            **self._epoch_means(step, recon, tf.reduce_sum(kl_per_group), apply, state),
            **_group_report(channel_kl),
            "loss": loss,
            "beta": beta,
            "lambda": regularization,
            "learning_rate": rate,
            "spectral_loss": losses.spectral,
            "batch_norm_loss": losses.batch_norm,
            "gradient_norm": norm,
            "skipped_steps": state.value(self.skipped),
            "loss_scale": loss_scale if self._scales_loss else tf.ones(()),
            "gamma_per_group": losses.gamma,
        }

    @property
    def changed_variables(self) -> list[tf.Variable]:
        """Every variable that a step reads or changes, each once, in a fixed order."""
        variables = [*self.model.variables, *self.variables]
        return list({variable.ref(): variable for variable in variables}.values())

    def step_function(self, values, images):
        """One step as a pure function of its state and of images.

        Args:
            values: The values of `changed_variables`, a list of tensors.
            images: As for `compute_pass`.

        Returns:
            The values after the step, and the report of `update`.
        """
        state = TensorState(self.changed_variables, values)
        total = self.compute_pass(images, 0, state)
        for number in range(1, self.config.accumulate_steps):
            total = self.add_pass(total, images, number, state)
        logs = self.update(total, state)
        return state.tensors, logs

    def _coefficients(self, step):
        """beta and lambda of the step that follows `step` others."""
        beta = objective.kl_coefficient(step, self.total_steps, self.config)
        risen = beta / self.config.kl_max_coeff
        return beta, objective.regularization_coefficient(risen, self.config)

    @property
    def _scales_loss(self) -> bool:
        return self.config.precision == "mixed_float16"

    def zero_pass(self) -> PassResult:
        """Zeros with the structure and shapes of `compute_pass`'s result, to start a sum of passes."""
        groups = tf.zeros(len(self.model.groups))
        losses = Losses(**dict.fromkeys(Losses._fields, tf.zeros(())))
        channel_kl = tf.zeros((len(self.model.groups), self.model.config.num_latent_per_group))
        statistics = [tf.zeros(norm.statistics_size) for norm in self.batch_norms]
        return PassResult(
            losses._replace(kl_per_group=groups, gamma=groups),
            channel_kl,
            [tf.zeros(stack.shape) for stack in self.weights],
            statistics,
            [tf.zeros(vectors.shape) for vectors in self.spectral.vectors],
        )

    def _record_skips(self, good, diverged, terms, kl_per_group, state):
        """Counts skipped steps; for the first of a row, records which terms were not finite."""
        bad_before = state.value(self.consecutive_skips)
        infinite = ~tf.math.is_finite(tf.concat([tf.stack(terms), kl_per_group], 0))
        starts = ~good & tf.equal(bad_before, 0)
        causes = tf.where(starts, infinite, state.value(self.first_skip_causes))
        state.assign(self.first_skip_causes, causes)
        row = tf.where(good, tf.zeros_like(bad_before), bad_before + 1)
        state.assign(self.consecutive_skips, tf.where(diverged, bad_before, row))
        state.assign(self.skipped, state.value(self.skipped) + tf.cast(~good, tf.int64))

    def _adapt_loss_scale(self, finite, state):
        good = tf.where(finite, state.value(self.steps_since_overflow) + 1, 0)
        grows = good >= SCALE_GROWTH_STEPS
        factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
        scale = tf.maximum(state.value(self.loss_scale) * factor, 1.0)
        state.assign(self.loss_scale, scale)
        state.assign(self.steps_since_overflow, tf.where(grows, tf.zeros_like(good), good))

    def _epoch_means(self, step, recon, kl, applied, state):
        """Means over the steps of this epoch that were not skipped; NaN if there are none yet."""
        starts = tf.equal(step % self.steps_per_epoch, 0)
        before = state.value(self.epoch_sums)
        before = tf.where(starts, tf.zeros_like(before), before)
        values = tf.cast(tf.stack([recon, kl, tf.ones(())]), tf.float64)
        sums = before + tf.where(applied, values, tf.zeros_like(values))
        state.assign(self.epoch_sums, sums)
        recon, kl = tf.unstack(tf.cast(sums[:2] / sums[2], tf.float32))
        return self._summary(recon, kl)

    def _summary(self, recon, kl):
        bits = self.model.bits_per_dim(recon + kl)
        return {"nelbo": recon + kl, "bpd": bits, "recon": recon, "kl": kl}

    def validation_step(self, images, indices, weights, state=None):
        """The NELBO of images (beta 1, no balancing) in evaluation mode, on this replica.

        It is computed with the moving averages of the weights if there are any.

        Args:
            images: Images (batch, height, width, channels) in [0, 1].
            indices: Index of each image in its data set, (batch,). Besides the seed, an image's noise
                depends on nothing else.
            weights: 1 for images that count, 0 for those that only fill a batch, float32 (batch,).
            state: Where the model's weights and averages are read (`nvae_tf.engine.state`); default:
                from their variables.

        Returns:
            Weighted sums over the images of all replicas: their number, recon, and the KL of every
            latent channel (groups, latents), the latter two in nats.
        """
        noise = self.model.draw_noise(indices, (self.seed, VALIDATION_STREAM))
        state = state or VariableState()
        tensors = {stack.ref(): state.value(stack) for stack in self.model.stacks}
        if self.averages:
            tensors.update(self._by_reference(self.averages.values(state)))
        scope = Scope(values=rows_of(weights_below(self.model), tensors), on_gpu=self.on_gpu)
        encoded = self.model.bottom_up(images, scope)
        output = self.model.top_down(FromPosterior(encoded, noise), scope)
        recon = -self.model.log_likelihood(output.parameters, images)
        sums = [
            tf.reduce_sum(weights),
            tf.reduce_sum(weights * recon),
            _channel_kl(output, weights),
        ]
        return sum_over_replicas(sums)

    def validate(self, run_step, batches, stop=lambda: False) -> dict[str, tf.Tensor] | None:
        """Computes the mean NELBO and its parts over a data set.

        Args:
            run_step: The traced `validation_step` (see `distributed_validation`).
            batches: Batches (images, indices, weights) that hold every image once.
            stop: Called after every batch; if it returns True, validation ends.

        Returns:
            Dictionary of means over the images: ``nelbo``, ``recon`` and ``kl`` in nats, ``bpd`` in
            bits per dimension, ``kl_per_group``, ``active_latents_per_group`` and ``active_latents``.
            None if validation was stopped.
        """
        sums: list = []
        for batch in batches:
            sums = add_sums(sums, run_step(*batch))
            if stop():
                return None
        return self.means(sums)

    def means(self, sums: list) -> dict[str, tf.Tensor]:
        """Means over images.

        Args:
            sums: The result of `add_sums` for the last batch.

        Returns:
            As for `validate`.
        """
        count, recon, channel_kl = sums
        recon = tf.cast(recon / count, tf.float32)
        channel_kl = tf.cast(channel_kl / count, tf.float32)
        return {**self._summary(recon, tf.reduce_sum(channel_kl)), **_group_report(channel_kl)}


def add_sums(before: list, sums) -> list[tf.Tensor]:
    """Adds a batch's sums to those of the batches before it, in float64.

    Args:
        before: The result for the batch before; empty for the first.
        sums: The result of `Trainer.validation_step`.
    """
    sums = [tf.cast(value, tf.float64) for value in sums]
    return [a + b for a, b in zip(before, sums, strict=True)] if before else sums


def _assign(variables, values) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _channel_kl(output: NVAEOutput, weights=None):
    """KL of every latent channel in nats, (groups, latents): batch mean, or with weights a sum."""
    if weights is None:
        return tf.reduce_mean(output.kl_per_channel, 0)
    return tf.tensordot(weights, output.kl_per_channel, 1)


def _group_report(channel_kl):
    active = objective.active_latents(channel_kl)
    return {
        "kl_per_group": tf.reduce_sum(channel_kl, 1),
        "active_latents_per_group": active,
        "active_latents": tf.reduce_sum(active),
    }

"""One step of training and one of validation: the model, its objective and its optimiser."""

from typing import NamedTuple

import tensorflow as tf
import tf_keras

from nvae_tf import objective
from nvae_tf.config import TrainConfig
from nvae_tf.layers.convolution import shared_kernels
from nvae_tf.layers.normalization import BatchNorm
from nvae_tf.model import NVAE, NVAEOutput
from nvae_tf.training.spectral import WARM_UP_ITERATIONS, SpectralNorms

VALIDATION_STREAM = 2**31 - 1  # of noise; training's streams are numbered by the step


class Losses(NamedTuple):
    """The terms of the objective in one step, in nats; per image where said, else scalars.

    Attributes:
        loss: what is minimised: mean(recon + beta * balanced KL) + lambda * (spectral + batch norm).
        recon: -log p(x | z), (batch,).
        kl_per_group: (batch, groups), coarsest group first.
        balanced_kl: sum over groups of gamma * KL, (batch,).
        gamma: balancing coefficients, (groups,).
        spectral: sum of the kernels' spectral norms.
        batch_norm: sum of the batch norms' largest |gamma|.
    """

    loss: tf.Tensor
    recon: tf.Tensor
    kl_per_group: tf.Tensor
    balanced_kl: tf.Tensor
    gamma: tf.Tensor
    spectral: tf.Tensor
    batch_norm: tf.Tensor

    @property
    def nelbo(self):
        """recon + KL of each image, unweighted, in nats, (batch,)."""
        return self.recon + tf.reduce_sum(self.kl_per_group, 1)


class Trainer(tf_keras.Model):
    """What ``fit`` and ``evaluate`` run.

    Everything that changes during training (annealing, noise, schedules) is a function of the
    optimiser's step count, so a resumed run goes on as if it had never stopped.

    Args:
        model: the NVAE to train.
        config: objective and schedule.
        total_steps: of the whole training.
        seed: of the noise.
    """

    def __init__(self, model: NVAE, config: TrainConfig, total_steps: int, seed: int = 0):
        super().__init__()
        self.model, self.config, self.total_steps, self.seed = model, config, total_steps, seed
        self.alphas = objective.balancing_weights(model.config)
        self.spectral = SpectralNorms(model.convolutions)
        self.batch_norms = [m for m in model.submodules if isinstance(m, BatchNorm)]
        self.means = {name: tf_keras.metrics.Mean(name) for name in ("nelbo", "bpd", "recon", "kl")}

    def prepare(self, images):
        """What a new training does once before its first step, beyond drawing the weights.

        Args:
            images: a batch, for data-dependent initialisation.
        """
        noise = self.model.draw_noise(tf.shape(images)[0], (self.seed, 0))
        self.model.initialize_from_data(images, noise)
        self.warm_up_spectral_norms()

    def warm_up_spectral_norms(self):
        """Brings fresh singular vectors near those of the kernels."""
        with shared_kernels(self.spectral.groups) as stacks:
            self.spectral.sum(stacks, WARM_UP_ITERATIONS)

    def losses_and_gradients(self, images, noise, beta, regularization):
        """One training-mode pass.

        Args:
            images: (batch, height, width, channels) in [0, 1].
            noise: as for `NVAE.call`.
            beta: the KL coefficient.
            regularization: lambda.

        Returns:
            `Losses`, the model's `NVAEOutput`, and the gradients of the model's trainable variables.
        """
        with tf.GradientTape() as tape, shared_kernels(self.spectral.groups) as stacks:
            output = self.model(images, noise, training=True)
            losses = self.losses(output, images, beta, regularization, stacks)
        gradients = tape.gradient(losses.loss, self.model.trainable_variables)
        return losses, output, gradients

    def losses(self, output: NVAEOutput, images, beta, regularization, stacks) -> Losses:
        """The objective's terms for what the model returned."""
        recon = -self.model.log_likelihood(output.parameters, images)
        kl_per_group = output.kl_per_group
        balanced_kl, gamma = objective.balance_kl(kl_per_group, self.alphas, beta)
        spectral = self.spectral.sum(stacks)
        batch_norm = objective.batch_norm_penalty(self.batch_norms)
        loss = tf.reduce_mean(recon + beta * balanced_kl)
        loss += regularization * (spectral + batch_norm)
        return Losses(loss, recon, kl_per_group, balanced_kl, gamma, spectral, batch_norm)

    # Nothing here needs AutoGraph, and tracing takes two thirds of the time without it.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, images):
        """One step; returns what callbacks may report.

        Scalars ``nelbo``, ``bpd``, ``recon`` and ``kl`` are means over the epoch so far; all others
        are of this step. Names that end in ``_per_group`` are vectors, coarsest group first.
        """
        step = self.optimizer.iterations
        beta = objective.kl_coefficient(step, self.total_steps, self.config)
        regularization = objective.regularization_coefficient(beta, self.config)
        noise = self.model.draw_noise(
            tf.shape(images)[0], tf.stack([self.seed, tf.cast(step, tf.int32)])
        )
        losses, output, gradients = self.losses_and_gradients(images, noise, beta, regularization)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))
        return {
            **self._update_means(losses.recon, losses.kl_per_group),
            **_group_report(output),
            "loss": losses.loss,
            "beta": beta,
            "lambda": regularization,
            "learning_rate": self.optimizer.learning_rate,
            "spectral_loss": losses.spectral,
            "batch_norm_loss": losses.batch_norm,
            "gradient_norm": tf.linalg.global_norm(gradients),
            "gamma_per_group": losses.gamma,
        }

    @tf.autograph.experimental.do_not_convert
    def test_step(self, images):
        """NELBO of a batch (beta 1, no balancing), in evaluation mode."""
        # The images counted so far tell the batches of a validation apart, and start at 0 each time.
        counted = tf.cast(self.means["nelbo"].count, tf.int32)
        seed = tf.random.experimental.stateless_fold_in((self.seed, VALIDATION_STREAM), counted)
        noise = self.model.draw_noise(tf.shape(images)[0], seed)
        output = self.model(images, noise)
        recon = -self.model.log_likelihood(output.parameters, images)
        return {**self._update_means(recon, output.kl_per_group), **_group_report(output)}

    @property
    def metrics(self):
        """The running means, which Keras resets at the start of epochs and validations."""
        return list(self.means.values())

    def _update_means(self, recon, kl_per_group):
        kl = tf.reduce_sum(kl_per_group, 1)
        bpd = self.model.image.bits_per_dim(recon + kl)
        values = {"nelbo": recon + kl, "bpd": bpd, "recon": recon, "kl": kl}
        for name, value in values.items():
            self.means[name].update_state(value)
        return {name: mean.result() for name, mean in self.means.items()}


def _group_report(output: NVAEOutput):
    active = tf.stack([objective.active_latents(latent.kl) for latent in output.latents])
    return {
        "kl_per_group": tf.reduce_mean(output.kl_per_group, 0),
        "active_latents_per_group": active,
        "active_latents": tf.reduce_sum(active),
    }

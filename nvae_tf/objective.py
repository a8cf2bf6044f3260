"""Terms and coefficients of the objective (paper, sections 2, 3.2 and 3.3, appendix A).

The functions take the model's KL, the scales of batch norms, the step and the configuration. The
spectral term is in `nvae_tf.engine.kernels`. Groups are ordered from the coarsest.
"""

import math

import tensorflow as tf

from nvae_tf.config import ModelConfig, TrainConfig

ACTIVE_NATS = 0.1  # a latent channel counts as active above this mean KL


def kl_coefficient(step, total_steps: int, config: TrainConfig):
    """beta, the weight of the KL, a float32 scalar (section 3.3).

    After a constant phase it rises linearly, reaching 1 after the annealing phase. It is bounded by
    ``kl_const_coeff`` from below and by ``kl_max_coeff`` from above.

    Args:
        step: Number of steps before this one, a scalar tensor.
        total_steps: Number of steps of the whole training.
        config: Gives ``kl_anneal_portion``, ``kl_const_portion``, ``kl_const_coeff`` and
            ``kl_max_coeff``.
    """
    constant = config.kl_const_portion * total_steps
    anneal = config.kl_anneal_portion * total_steps
    rising = (tf.cast(step, tf.float32) - constant) / max(anneal, 1e-6)
    return tf.maximum(tf.minimum(rising, config.kl_max_coeff), config.kl_const_coeff)


def balancing_weights(config: ModelConfig) -> list[float]:
    """alpha of every group, coarsest group first.

    In scale s (0 the coarsest) alpha is 4^s / (number of groups in the scale), divided by the smallest
    of these values.
    """
    alphas = [
        4.0**scale / count
        for scale, count in enumerate(reversed(config.groups_per_scale))
        for _ in range(count)
    ]
    return [alpha / min(alphas) for alpha in alphas]


def balance_kl(kl_per_group, mean_kl, alphas, beta):
    """Weights the KL of each group so that no group is switched off during warm-up (appendix A).

    Args:
        kl_per_group: KL of each image and group in nats, (batch, groups).
        mean_kl: Mean of the absolute values of `kl_per_group` over the global batch, (groups,).
        alphas: The result of `balancing_weights`.
        beta: The KL coefficient divided by its largest value; at 1 every group has weight 1.

    Returns:
        The balanced KL of each image in nats, (batch,), and the weights gamma, (groups,).
    """
    size = mean_kl + 0.01
    gamma = size / tf.constant(alphas, size.dtype) * tf.reduce_sum(size)
    gamma = tf.stop_gradient(gamma / tf.reduce_mean(gamma))
    gamma = tf.where(beta < 1.0, gamma, tf.ones_like(gamma))
    return tf.reduce_sum(kl_per_group * gamma, 1), gamma


def regularization_coefficient(beta, config: TrainConfig):
    """lambda, the weight of the spectral and batch-norm terms, a float32 scalar (section 3.2).

    With ``weight_decay_norm_anneal``, log lambda moves linearly in beta from ``weight_decay_norm_init``
    to ``weight_decay_norm``.

    Args:
        beta: The KL coefficient divided by its largest value.
        config: Gives ``weight_decay_norm``, ``weight_decay_norm_init`` and
            ``weight_decay_norm_anneal``.
    """
    if not config.weight_decay_norm_anneal:
        return tf.constant(config.weight_decay_norm, tf.float32)
    start, end = math.log(config.weight_decay_norm_init), math.log(config.weight_decay_norm)
    return tf.exp((1.0 - beta) * start + beta * end)


def batch_norm_penalty(gammas: list):
    """The sum over batch norms of the largest |gamma|, a scalar (section 3.2).

    Args:
        gammas: Scales of the batch norms: one tensor (n, channels) for the n batch norms of each width.
    """
    largest = [tf.reduce_sum(tf.reduce_max(tf.abs(gamma), 1)) for gamma in gammas]
    return tf.add_n(largest) if largest else tf.zeros(())  # res_elu cells have no batch norms


def active_latents(channel_kl):
    """Number of latent channels of each group with a mean KL above `ACTIVE_NATS`, float32 (groups,).

    Args:
        channel_kl: KL of every latent channel in nats, summed over its map and averaged over images,
            (groups, latents).
    """
    return tf.reduce_sum(tf.cast(channel_kl > ACTIVE_NATS, tf.float32), 1)

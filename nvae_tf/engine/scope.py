"""What a pass over layers is run with: one argument that is handed down to every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from nvae_tf.config import NO_REMAT
from nvae_tf.engine.weights import Weight


class BatchStatistics(NamedTuple):
    """Statistics of a layer's batch, over all replicas.

    They are handed around as one vector, since every tensor costs nodes of the graph both ways.

    Attributes:
        mean: Per channel, (..., channels).
        variance: Per channel, biased, (..., channels).
        count: Number of elements per channel that they were computed from, float32, (..., 1).
    """

    mean: tf.Tensor
    variance: tf.Tensor
    count: tf.Tensor

    @classmethod
    def from_vector(cls, vector) -> "BatchStatistics":
        """The inverse of `vector`."""
        channels = (vector.shape[-1] - 1) // 2
        return cls(*tf.split(vector, [channels, channels, 1], -1))

    @property
    def vector(self) -> tf.Tensor:
        """All of them as one tensor, (..., 2 * channels + 1)."""
        return tf.concat(self, -1)

    @property
    def unbiased(self):
        """The unbiased variance, which running averages take."""
        return self.variance * (self.count / tf.maximum(self.count - 1.0, 1.0))


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
    """How a pass is run. Layers ask it for the values of their weights, and leave statistics in it.

    Without arguments: an evaluation pass with the weights as they are.

    Attributes:
        training: Batch norm uses the statistics of the batch.
        values: Tensors used in place of weights; all other weights are read from their stacks.
        kernels: The kernels of this step, normalised beforehand, by convolution.
        statistics: What batch norms saw in training, by layer, as vectors (`BatchStatistics`); filled
            in the order of the calls.
        given_statistics: Mean and biased variance, (channels,) each, that batch norms use in evaluation
            instead of their running averages, by layer.
        exchanged_statistics: What replicas have exchanged already, where a block is rematerialized, by
            layer, as vectors.
        replica_row: Marks this replica among those that share the batch, one-hot, (replicas,); None if
            this one has the batch for itself.
        rematerialize: What is computed again in the backward pass (gradient checkpointing): ``"none"``;
            ``"bn_swish"``: batch norm, its activation and the convolution that follows; ``"cells"``:
            whole residual cells, and per group the draw of its latents and its combiner.
        functions: The functions that identical blocks share (`nvae_tf.engine.shared_functions`); None:
            nothing is shared.
        differentiated: Whether gradients are taken through this computation; false for the first run of
            a block that is rematerialized for its gradient.
        xla_regions: Whether the operations between convolutions are compiled with XLA.
        xla_step: Whether the whole pass is compiled with XLA.
        custom_gradients: Use the faster gradients of our own. For training graphs only: TensorFlow
            never frees a graph that contains a custom gradient.
        on_gpu: The pass is for a GPU, where some operations that are fast on CPUs do not exist.
        data_initialization: Convolutions with ``data_init`` set their norm and bias from their input.
    """

    training: bool = False
    values: Mapping[Weight, tf.Tensor] = dataclasses.field(default_factory=dict)
    kernels: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    statistics: dict[Any, tf.Tensor] = dataclasses.field(default_factory=dict)
    given_statistics: Mapping[Any, tuple] = dataclasses.field(default_factory=dict)
    exchanged_statistics: Mapping[Any, tf.Tensor] = dataclasses.field(default_factory=dict)
    replica_row: tf.Tensor | None = None
    rematerialize: str = NO_REMAT
    functions: Any = None
    differentiated: bool = True
    xla_regions: bool = False
    xla_step: bool = False
    custom_gradients: bool = False
    on_gpu: bool = False
    data_initialization: bool = False

    def value(self, weight: Weight) -> tf.Tensor:
        """The value of a layer's weight in this pass."""
        tensor = self.values.get(weight)
        return weight.value() if tensor is None else tensor

    @property
    def exchanges_statistics(self) -> bool:
        """Whether batch norms exchange the statistics of their batch with other replicas."""
        return self.training and self.replica_row is not None

    @property
    def settings(self) -> tuple:
        """All that changes what a layer computes, but for tensors; hashable."""
        return (
            self.training,
            self.rematerialize,
            self.xla_regions,
            self.xla_step,
            self.custom_gradients,
            self.on_gpu,
            self.data_initialization,
        )

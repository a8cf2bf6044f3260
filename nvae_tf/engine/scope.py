"""`Scope`: the one argument that says how a pass is run, handed down to every layer."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from nvae_tf.config import NO_REMAT
from nvae_tf.engine.weights import Weight


class BatchStatistics(NamedTuple):
    """The batch statistics of a layer, over all replicas.

    They are passed around as one vector, since every tensor costs graph nodes in both passes.

    Attributes:
        mean: Mean of each channel, (..., channels).
        variance: Biased variance of each channel, (..., channels).
        count: Number of elements per channel that the statistics come from, float32, (..., 1).
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
        """Mean, variance and count as one tensor, (..., 2 * channels + 1)."""
        return tf.concat(self, -1)

    @property
    def unbiased(self):
        """The unbiased variance, (..., channels), which the running averages use."""
        return self.variance * (self.count / tf.maximum(self.count - 1.0, 1.0))


@dataclasses.dataclass(frozen=True, eq=False)
class Scope:
    """How a pass is run: layers read the values of their weights from it.

    It is also where they leave what a pass computes besides its outputs: `statistics` is the only
    attribute that changes. The defaults are those of an evaluation pass with the weights as they are.

    Attributes:
        training: Whether batch norms use the statistics of the batch.
        values: Tensors used in place of weights; all other weights are read from their stacks.
        kernels: The `NormalizedKernel` of each convolution, if they were computed beforehand.
        statistics: Batch statistics of each batch norm in training, as vectors (`BatchStatistics`), in
            the order of the calls. The layers fill it.
        given_statistics: Mean and biased variance, (channels,) each, that a batch norm uses in
            evaluation in place of its running averages.
        exchanged_statistics: Statistics from a block's first run, as vectors by layer, so that its
            rematerialization does not exchange them again.
        replica_row: One-hot vector (replicas,) that marks this replica among those that share the
            batch; None if there is only one.
        rematerialize: What is recomputed in the backward pass (gradient checkpointing): ``"none"``;
            ``"bn_swish"``: batch norm, its activation and the convolution that follows; ``"cells"``:
            whole residual cells, and in each group the draw of the latents and the combiner.
        functions: The cache of functions that identical blocks share
            (`nvae_tf.engine.shared_functions`); None: nothing is shared.
        differentiated: Whether gradients are taken through this computation; false in the first run of
            a block that will be rematerialized.
        xla_regions: Whether the operations between convolutions are compiled with XLA.
        xla_step: Whether the whole pass is compiled with XLA.
        custom_gradients: Whether to use our own, faster gradients. For training graphs only:
            TensorFlow never frees a graph that contains a custom gradient.
        on_gpu: Whether the pass is for a GPU, where some operations that are fast on CPUs do not exist.
        data_initialization: Whether convolutions with ``data_init`` set their norm and bias from their
            input.
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
        """Everything besides tensors that changes what a layer computes; hashable."""
        return (
            self.training,
            self.rematerialize,
            self.xla_regions,
            self.xla_step,
            self.custom_gradients,
            self.on_gpu,
            self.data_initialization,
        )

"""The base class of all layers: how they are built, hold weights, and are called."""

from typing import NamedTuple

import tensorflow as tf
import tf_keras

from nvae_tf.engine.scope import Scope
from nvae_tf.engine.weights import (
    WEIGHT,
    Weight,
    assign_all,
    fresh_seed,
    stack_weights,
    weights_below,
)


class Layer(tf_keras.layers.Layer):
    """A Keras layer whose weights are rows of stacks, and which is run with a `Scope`.

    Subclasses create their weights and those of their sublayers in `create`, and compute in `call`,
    where they must read a weight as ``scope.value(self.weight)``. The stacks belong to the outermost
    layer or model. A layer computes in the precision of its inputs, whatever Keras's dtype policy says.

    Attributes:
        statistics_size: Length of the vector of batch statistics that the layer stores in
            `Scope.statistics` in training; 0 if it stores none.
    """

    statistics_size = 0

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def create(self, input_shape) -> None:
        """Creates the weights of the layer and its sublayers, but not the variables that hold them.

        Args:
            input_shape: Shape of the input; only the number of channels needs to be known.
        """

    def build(self, input_shape):
        """Creates the weights and their stacks; only for a layer that is not part of another one."""
        self.create(tf.TensorShape(input_shape))
        self.stacks = stack_weights(self)
        super().build(input_shape)

    def __call__(self, *inputs, scope: Scope | None = None, **kwargs):
        """Runs the layer.

        Args:
            *inputs: Arguments of `call`.
            scope: How the layer is run; default: in evaluation, with its weights as they are. Without
                a scope or before it is built, the layer is called through Keras, which builds it.
            **kwargs: Further arguments of `call`.
        """
        if scope is None or not self.built:
            return super().__call__(*inputs, scope=scope or Scope(), **kwargs)
        return self.call(*inputs, scope=scope, **kwargs)

    def add_weight(self, shape, initializer, trainable=True, kind=WEIGHT) -> Weight:
        """Creates a weight of this layer; arguments as for `Weight`."""
        return Weight(shape, initializer, trainable, kind)

    def get_weights(self):
        """The values of the weights of the layer and its sublayers, as arrays."""
        return [weight.numpy() for weight in weights_below(self)]

    def set_weights(self, weights):
        """Assigns arrays to the weights, in the order of `get_weights`.

        Raises:
            ValueError: Their number or the shape of one is not that of the weights.
        """
        assign_all(dict(zip(weights_below(self), weights, strict=True)))

    def count_params(self):
        """Number of values in all weights of the layer and its sublayers, trainable or not."""
        return sum(weight.shape.num_elements() for weight in weights_below(self))


def create_chain(layers, channels: int) -> None:
    """Creates the weights of consecutive layers from shapes alone.

    Keras would run every layer once instead, which is slow with several thousand weights.

    Args:
        layers: The layers in order. Layers that already have weights keep them.
        channels: Number of channels of the first layer's input.
    """
    shape = tf.TensorShape((None, None, None, channels))
    for layer in layers:
        if not layer.built:
            layer.create(shape)
            layer.built = True
        shape = layer.compute_output_shape(shape)


class Uniform(NamedTuple):
    """Initial values drawn from U(low, high).

    Initializers with equal `key` are drawn together, by one call of `draw`: a model has thousands of
    weights, and one draw per weight would make it slow to start.

    Attributes:
        low: Lower bound.
        high: Upper bound.
    """

    low: float
    high: float

    @property
    def key(self):
        """The initializer itself, so that equal initializers are drawn together."""
        return self

    def draw(self, shape, initializers):
        """Draws several weights of one shape at once.

        Args:
            shape: Shape of the stacked weights, (n, *shape of a weight).
            initializers: The n initializers, whose keys are equal.

        Returns:
            The initial values, a float32 tensor of that shape.
        """
        return _draw_uniform(tf.constant(shape), tf.constant(fresh_seed()), self.low, self.high)


# In a graph TensorFlow scales and shifts the drawn values in place. Eagerly it would allocate a model's
# weights, which are gigabytes, three times.
@tf.function(
    autograph=False,
    input_signature=[
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([2], tf.int64),
        tf.TensorSpec([]),
        tf.TensorSpec([]),
    ],
)
def _draw_uniform(shape, seed, low, high):
    return tf.random.stateless_uniform(shape, seed, low, high)


class Constant(NamedTuple):
    """Initial values that are all equal; used like `Uniform`.

    Attributes:
        value: The value.
    """

    value: float

    @property
    def key(self):
        """The initializer itself, so that equal initializers are filled together."""
        return self

    def draw(self, shape, initializers):
        """Fills several weights at once; arguments as for `Uniform.draw`."""
        return tf.fill(shape, self.value)


def uniform_fan_in(fan_in: int) -> Uniform:
    """An initializer that draws from U(-b, b) with b = 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return Uniform(-bound, bound)

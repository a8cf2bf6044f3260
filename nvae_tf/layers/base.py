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

    Subclasses create their weights and build their sublayers in `create`, and compute in `call`, where
    ``scope.value(self.weight)`` is the value of a weight. The stacks belong to the outermost layer or
    model. A layer computes in the precision of its inputs, whatever Keras's dtype policy says.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def create(self, input_shape) -> None:
        """Creates the weights of the layer and its sublayers, but no variables.

        Args:
            input_shape: Shape of the input; only its channels need to be known.
        """

    def build(self, input_shape):
        """Builds a layer that is not a part of another: creates its weights and their stacks."""
        self.create(tf.TensorShape(input_shape))
        self.stacks = stack_weights(self)
        super().build(input_shape)

    def __call__(self, *inputs, scope: Scope | None = None, **kwargs):
        """Runs the layer.

        Args:
            *inputs: Arguments of `call`.
            scope: How the layer is run. Without one, Keras runs it: in evaluation, with its weights as
                they are, and built first if need be.
            **kwargs: Further arguments of `call`.
        """
        if scope is None or not self.built:
            return super().__call__(*inputs, scope=scope or Scope(), **kwargs)
        return self.call(*inputs, scope=scope, **kwargs)

    def add_weight(self, shape, initializer, trainable=True, kind=WEIGHT) -> Weight:
        """Creates a weight of this layer (see `Weight`)."""
        return Weight(shape, initializer, trainable, kind)

    def get_weights(self):
        """The values of the weights of the layer and its sublayers, as arrays."""
        return [weight.numpy() for weight in weights_below(self)]

    def set_weights(self, weights):
        """Assigns arrays to the weights, in the order of `get_weights`."""
        assign_all(dict(zip(weights_below(self), weights, strict=True)))

    def count_params(self):
        """Number of values in the weights of the layer and its sublayers."""
        return sum(weight.shape.num_elements() for weight in weights_below(self))


def create_chain(layers, channels: int) -> None:
    """Creates the weights of layers that follow each other.

    Shapes are enough for that. Keras would run every layer once, which takes long with several
    thousand weights.

    Args:
        layers: The layers in order. Those that have weights already keep them.
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

    Initializers with the same `key` are drawn together, by `draw` of one of them: a model has
    thousands of weights, and a draw for each would make it slow to start.

    Attributes:
        low: Lower bound.
        high: Upper bound.
    """

    low: float
    high: float

    @property
    def key(self):
        """The initializer itself: equal ones are drawn together."""
        return self

    def draw(self, shape, initializers):
        """Draws several weights of one shape at once.

        Args:
            shape: Shape of all of them together, (n, *shape of a weight).
            initializers: The initializers, one per weight.
        """
        return _draw_uniform(tf.constant(shape), tf.constant(fresh_seed()), self.low, self.high)


# A graph, since there TensorFlow scales and shifts in place what it drew. The weights of a model are
# gigabytes, which would be allocated three times otherwise.
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
        """The initializer itself: equal ones are filled together."""
        return self

    def draw(self, shape, initializers):
        """Fills several weights at once; arguments as for `Uniform.draw`."""
        return tf.fill(shape, self.value)


def uniform_fan_in(fan_in: int) -> Uniform:
    """Initial values from U(-b, b), b = 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return Uniform(-bound, bound)

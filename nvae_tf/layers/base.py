"""What all layers have in common: how they are built, hold weights, and are called."""

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

    Subclasses make their weights and the layers within in `create`, and compute in `call`, where
    ``scope.value(self.weight)`` is the value of a weight. The stacks belong to the outermost layer or
    model. It computes in the precision of its inputs, whatever the policy in force.
    """

    def __init__(self, **kwargs):
        super().__init__(autocast=False, **kwargs)

    def create(self, input_shape) -> None:
        """Makes weights and the layers within, without variables.

        Args:
            input_shape: Shape of the input; only its channels need to be known.
        """

    def build(self, input_shape):
        """Builds a layer that stands on its own, as Keras does: makes its weights and their stacks."""
        self.create(tf.TensorShape(input_shape))
        self.stacks = stack_weights(self)
        super().build(input_shape)

    def __call__(self, *inputs, scope: Scope | None = None, **kwargs):
        """Runs the layer; without a scope as Keras does, with the weights as they are.

        Args:
            *inputs: What `call` takes.
            scope: How the layer is run.
            **kwargs: What else `call` takes.
        """
        if scope is None or not self.built:
            return super().__call__(*inputs, scope=scope or Scope(), **kwargs)
        return self.call(*inputs, scope=scope, **kwargs)

    def add_weight(self, shape, initializer, trainable=True, kind=WEIGHT) -> Weight:
        """Makes a weight of this layer (see `Weight`)."""
        return Weight(shape, initializer, trainable, kind)

    def get_weights(self):
        """The values of the layer's weights and of those within, as arrays."""
        return [weight.numpy() for weight in weights_below(self)]

    def set_weights(self, weights):
        """Gives them other values, in the order of `get_weights`."""
        assign_all(dict(zip(weights_below(self), weights, strict=True)))

    def count_params(self):
        """How many numbers the weights of the layer and those within hold."""
        return sum(weight.shape.num_elements() for weight in weights_below(self))


def create_chain(layers, channels: int) -> None:
    """Makes the weights of layers that follow each other, the first on maps of so many channels.

    By their shapes alone, without running them once: that lets a model of several thousand weights
    start quickly.
    """
    shape = tf.TensorShape((None, None, None, channels))
    for layer in layers:
        if not layer.built:
            layer.create(shape)
            layer.built = True
        shape = layer.compute_output_shape(shape)


class Uniform(NamedTuple):
    """Initial values drawn from U(low, high).

    An initializer's `key` says with which others it can be drawn together, and `draw` does that.
    """

    low: float
    high: float

    @property
    def key(self):
        """Itself: equal ones are drawn together."""
        return self

    def draw(self, shape, initializers):
        """Draws several weights at once, (n, *shape), one for each of the initializers."""
        return tf.random.stateless_uniform(shape, fresh_seed(), self.low, self.high)


class Constant(NamedTuple):
    """Initial values that are all one number; see `Uniform`."""

    number: float

    @property
    def key(self):
        """Itself: equal ones are filled together."""
        return self

    def draw(self, shape, initializers):
        """Fills several weights at once, (n, *shape)."""
        return tf.fill(shape, self.number)


def uniform_fan_in(fan_in: int) -> Uniform:
    """Initial values from U(-b, b), b = 1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return Uniform(-bound, bound)

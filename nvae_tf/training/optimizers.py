"""The built-in optimisers (the paper's Adamax, Adam, AdamW), and moving averages of weights."""

import math

import numpy as np
import tensorflow as tf

from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import call_shared
from nvae_tf.engine.state import VariableState
from nvae_tf.engine.xla import LARGE_STACK
from nvae_tf.io.errors import UserError, short_repr


def _check_number(name: str, value, below: float = math.inf, above: float | None = None) -> None:
    """Raises a `UserError` unless `value` is a number, at least 0 or above `above`, below `below`."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < below or (above is not None and value <= above):
        least = "at least 0" if above is None else f"above {above:g}"
        limit = f" and below {below:g}" if below < math.inf else ""
        raise UserError(
            f"{name}: {short_repr(value)} is not allowed; expected a number, {least}{limit}"
        )


class Optimizer(tf.Module):
    """Base class of all optimisers: call `build` once, then `apply_gradients` once per step.

    Args:
        learning_rate: The learning rate, or a function that returns it for the number of steps taken.

    Attributes:
        iterations: Number of steps taken, an int64 variable.
    """

    def __init__(self, learning_rate):
        super().__init__()
        self._learning_rate = learning_rate
        self.iterations = tf.Variable(0, dtype=tf.int64, trainable=False, name="iterations")

    @property
    def learning_rate(self):
        """The learning rate of the next step."""
        return self.learning_rate_after(self.iterations)

    def learning_rate_after(self, steps):
        """The learning rate of the step that follows `steps` others, a float32 scalar."""
        rate = self._learning_rate
        return rate(steps) if callable(rate) else tf.constant(rate, tf.float32)

    def build(self, variables) -> None:
        """Creates the slots.

        Args:
            variables: The variables to train: stacks of weights.
        """
        raise NotImplementedError

    def apply_gradients(self, gradients, condition=True, scope=None, state=None) -> None:
        """Takes one step.

        Args:
            gradients: One tensor for each variable, of its shape.
            condition: A boolean scalar; if it is false, variables and slots stay as they are, but the
                step is still counted in `iterations`.
            scope: Says whether the update of large variables is compiled, and whether replicas share
                the function that updates the others (`nvae_tf.engine.scope.Scope`); default: neither.
            state: Where variables, slots and the number of steps are read and written
                (`nvae_tf.engine.state`); default: in their variables.
        """
        state = state or VariableState()
        steps = state.value(self.iterations)
        self._apply(gradients, steps, condition, scope or Scope(), state)
        state.assign(self.iterations, steps + 1)

    def _apply(self, gradients, steps, condition, scope, state) -> None:
        """Updates variables and slots; `steps` is the number of steps taken before this one."""
        raise NotImplementedError


class StackedOptimizer(Optimizer):
    """An element-wise optimiser, which updates all weights of a shape at once.

    Args:
        learning_rate: As for `Optimizer`.
        weight_decay: Coefficient of the weight decay, which applies to every variable.
        beta_1: Decay rate of the first moment.
        beta_2: Decay rate of the second moment (of the infinity norm for Adamax).
        epsilon: Small number that keeps the denominator of the update above 0.

    Raises:
        UserError: A number is negative, beta_1 or beta_2 is not below 1, or epsilon is 0.
    """

    SLOTS: tuple[str, ...] = ()  # names of the attributes with the slots, in the formula's order
    DECOUPLED = False  # whether weight decay is added to the update instead of the gradient
    UPDATE: "ElementwiseUpdate"  # applies the formula

    def __init__(self, learning_rate, weight_decay, beta_1, beta_2, epsilon):
        super().__init__(learning_rate)
        if not callable(learning_rate):
            _check_number("learning_rate", learning_rate)
        _check_number("weight_decay", weight_decay)
        _check_number("beta_1", beta_1, below=1.0)
        _check_number("beta_2", beta_2, below=1.0)
        _check_number("epsilon", epsilon, above=0.0)
        self.weight_decay, self.epsilon = weight_decay, epsilon
        self.beta_1, self.beta_2 = beta_1, beta_2
        self._built = False  # Keras's `BackupAndRestore` builds an optimiser that is not

    def build(self, variables) -> None:
        """Creates the slots, shaped as the variables.

        Raises:
            UserError: The optimiser has slots for other variables already.
        """
        if self._built:
            raise UserError(
                f"optimizer: this {type(self).__name__} has slots for the weights of an earlier "
                "compile; make a new one"
            )
        self._variables, self._built = list(variables), True
        for name in self.SLOTS:
            setattr(self, name, zeros_like(variables))

    def _apply(self, gradients, steps, condition, scope, state) -> None:
        """Changes all weights of a shape at once."""
        count, rate = tf.cast(steps + 1, tf.float32), self.learning_rate_after(steps)
        coefficients = tf.stack(
            [
                rate / (1.0 - tf.pow(self.beta_1, count)),
                1.0 - tf.pow(self.beta_2, count),
                self.weight_decay * rate if self.DECOUPLED else self.weight_decay,
                self.beta_1,
                self.beta_2,
                self.epsilon,
            ]
        )
        slots = [getattr(self, name) for name in self.SLOTS]
        stacks = list(zip(self._variables, *slots, strict=True))
        self.UPDATE(stacks, gradients, coefficients, condition, scope, state)


def zeros_like(variables) -> list[tf.Variable]:
    """Creates variables of zeros with the shapes of the given ones."""
    return [_variable_of_zeros(variable.shape) for variable in variables]


def _variable_of_zeros(shape) -> tf.Variable:
    if not shape.rank:
        return tf.Variable(tf.zeros(shape), trainable=False)
    # Workers send each other the initial values of variables, which are gigabytes even if they are
    # zeros. So only one row is sent, and every worker makes the others itself.
    anything = tf.TensorShape([None, *shape[1:]])
    variable = tf.Variable(tf.zeros([1, *shape[1:]]), trainable=False, shape=anything)
    variable.assign(tf.zeros(shape))
    return variable


class ElementwiseUpdate:
    """Applies an element-wise formula to stacks of weights and their slots.

    Large stacks are updated one at a time and in place. Small ones are updated together, in a function
    that replicas share. A formula has to select between the new and old values of a slot *before* it
    computes anything from the slot; otherwise XLA copies the old values first.

    Args:
        formula: Function of where_applied, the values of a stack and of its slots, a tensor of their
            shape (the gradient) and the coefficients; returns the new values of stack and slots.
            ``where_applied(new, old)`` is `new` if the step is applied, else `old`.
    """

    def __init__(self, formula):
        self._formula = formula

        def in_place(*arguments):
            self._in_place(*arguments)  # an output would be a copy of the weights

        self._in_place_xla = tf.function(in_place, autograph=False, jit_compile=True)

    def __call__(self, stacks, tensors, coefficients, condition, scope: Scope, state) -> None:
        """Updates the variables.

        Args:
            stacks: For each stack, the list of its variable and those of its slots, all of one shape.
            tensors: For each stack a tensor of that shape, such as the gradient.
            coefficients: The formula's coefficients, a tensor.
            condition: A boolean scalar; if it is false, nothing changes.
            scope: As for `Optimizer.apply_gradients`.
            state: Where the variables are read and written (`nvae_tf.engine.state`).
        """
        condition = tf.convert_to_tensor(condition)
        small, values, before = [], [], condition
        for stack, tensor in zip(stacks, tensors, strict=True):
            large = tensor.shape.num_elements() >= LARGE_STACK
            if large and isinstance(state, VariableState):
                local = [state.local(variable) for variable in stack]
                if scope.xla_regions:
                    self._in_place_xla(local, tensor, coefficients, condition)
                    continue
                # Otherwise TensorFlow multiplies all weights and slots by the coefficients at once,
                # before the forward pass. So the coefficients wait for the previous stack.
                with tf.control_dependencies([before]):
                    numbers = tf.identity(coefficients)
                before = self._in_place(local, tensor, numbers, condition)
            else:
                small += stack
                values += [tensor, *map(state.value, stack)]
        if small:
            arguments, size = [coefficients, condition, *values], len(stacks[0])
            values = call_shared(
                _update_all,
                arguments,
                scope,
                has_gradient=False,
                formula=self._formula,
                size=size,
            )
            for variable, value in zip(small, values, strict=True):
                state.assign(variable, value)

    def _in_place(self, variables, tensor, coefficients, condition):
        """Updates a stack and its slots; returns the stack's new values."""
        values = [variable.read_value() for variable in variables]
        after = self._formula(_where(condition), *values, tensor, coefficients)
        for variable, value in zip(variables, after, strict=True):
            variable.assign(value)
        return after[0]


def _update_all(coefficients, condition, *tensors, formula, size: int):
    """The new values of several stacks.

    Args:
        coefficients: The formula's coefficients, a tensor.
        condition: A boolean scalar; if it is false, the values are the old ones.
        *tensors: For each stack, one after the other: its tensor, its values and those of its slots.
        formula: As for `ElementwiseUpdate`.
        size: Number of variables of each stack, slots included.
    """
    values = []
    for begin in range(0, len(tensors), size + 1):
        tensor, *before = tensors[begin : begin + size + 1]
        values += formula(_where(condition), *before, tensor, coefficients)
    return values


def _where(condition):
    return lambda new, old: tf.where(condition, new, old)


def _adamax(where_applied, weight, m, u, gradient, coefficients):
    rate, _, decay, beta_1, beta_2, epsilon = tf.unstack(coefficients)
    gradient = gradient + decay * weight
    m = where_applied(beta_1 * m + (1.0 - beta_1) * gradient, m)
    u = where_applied(tf.maximum(beta_2 * u, tf.abs(gradient) + epsilon), u)
    return where_applied(weight - rate * (m / u), weight), m, u


def _move_average(where_applied, average, value, decay):
    return [where_applied(decay * average + (1.0 - decay) * value, average)]


def _adam_step(where_applied, gradient, m, v, rate, correction, beta_1, beta_2, epsilon):
    m = where_applied(beta_1 * m + (1.0 - beta_1) * gradient, m)
    v = where_applied(beta_2 * v + (1.0 - beta_2) * gradient * gradient, v)
    return rate * m / (tf.sqrt(v / correction) + epsilon), m, v


def _adam(where_applied, weight, m, v, gradient, coefficients):
    rate, correction, decay, *others = tf.unstack(coefficients)
    gradient = gradient + decay * weight
    step, m, v = _adam_step(where_applied, gradient, m, v, rate, correction, *others)
    return where_applied(weight - step, weight), m, v


def _adamw(where_applied, weight, m, v, gradient, coefficients):
    rate, correction, decay, *others = tf.unstack(coefficients)
    step, m, v = _adam_step(where_applied, gradient, m, v, rate, correction, *others)
    return where_applied(weight - step - decay * weight, weight), m, v


class Adamax(StackedOptimizer):
    """Adamax with L2 decay inside the gradient and epsilon inside the maximum.

    ``g' = g + weight_decay * w``; ``m = b1 m + (1 - b1) g'``; ``u = max(b2 u, |g'| + epsilon)``;
    ``w -= learning_rate / (1 - b1^t) * m / u``.

    Reference: Kingma & Ba, *Adam*, 2015, section 7.1.
    """

    SLOTS = ("_m", "_u")
    UPDATE = ElementwiseUpdate(_adamax)

    def __init__(
        self, learning_rate=1e-2, weight_decay=3e-4, beta_1=0.9, beta_2=0.999, epsilon=1e-3
    ):
        super().__init__(learning_rate, weight_decay, beta_1, beta_2, epsilon)


class Adam(StackedOptimizer):
    """Adam with L2 decay inside the gradient: Kingma & Ba, *Adam*, 2015."""

    SLOTS = ("_m", "_v")
    UPDATE = ElementwiseUpdate(_adam)

    def __init__(
        self, learning_rate=1e-3, weight_decay=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-8
    ):
        super().__init__(learning_rate, weight_decay, beta_1, beta_2, epsilon)


class AdamW(Adam):
    """Adam with decoupled weight decay, in proportion to the learning rate.

    Reference: Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, 2019.
    """

    DECOUPLED = True
    UPDATE = ElementwiseUpdate(_adamw)


class MovingAverage(tf.Module):
    """Exponential moving averages of variables.

    Args:
        variables: Stacks of weights.
        decay: Decay rate per step. Early on it is smaller, so that the averages are close to the mean
            over the steps so far.

    Attributes:
        stacks: The averages, one variable for each variable.
    """

    UPDATE = ElementwiseUpdate(_move_average)

    def __init__(self, variables, decay: float):
        super().__init__()
        self._variables, self.decay = list(variables), decay
        self.stacks = zeros_like(variables)

    def values(self, state=None) -> list[tf.Tensor]:
        """The averages as tensors of the variables' shapes.

        Args:
            state: Where they are read (`nvae_tf.engine.state`); default: in their variables.
        """
        state = state or VariableState()
        pairs = zip(map(state.value, self.stacks), self._variables, strict=True)
        return [tf.ensure_shape(average, variable.shape) for average, variable in pairs]

    def start(self) -> None:
        """Sets the averages to the present values of the variables."""
        for average, variable in zip(self.stacks, self._variables, strict=True):
            average.assign(variable)

    def update(self, step, condition=True, scope=None, state=None) -> None:
        """Moves the averages towards the variables.

        Args:
            step: Steps taken, this one included.
            condition: A scalar; where it is false nothing changes.
            scope: As for `Optimizer.apply_gradients`.
            state: As for `Optimizer.apply_gradients`.
        """
        state = state or VariableState()
        done = tf.cast(step, tf.float32)
        decay = tf.minimum(self.decay, (done - 1.0) / (done + 9.0))
        stacks, values = [[s] for s in self.stacks], map(state.value, self._variables)
        self.UPDATE(stacks, list(values), decay, condition, scope or Scope(), state)

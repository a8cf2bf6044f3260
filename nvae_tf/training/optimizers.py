"""The optimisers, first of all the Adamax that NVAE is trained with; and moving averages of weights."""

import tensorflow as tf

from nvae_tf.engine.state import VariableState

LARGE = 2**20  # elements of a stack from which on its update is compiled, on CPUs


class Optimizer(tf.Module):
    """What all optimisers share: `build` is called once, then `apply_gradients` once per step.

    Args:
        learning_rate: A number, or a function from the steps taken to one.

    Attributes:
        iterations: Steps taken, an int64 variable.
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
        """The learning rate of the step that follows so many others."""
        rate = self._learning_rate
        return rate(steps) if callable(rate) else tf.constant(rate, tf.float32)

    def build(self, variables) -> None:
        """Creates the slots.

        Args:
            variables: What the optimiser will change: stacks of weights.
        """
        raise NotImplementedError

    def apply_gradients(
        self,
        gradients,
        condition=True,
        compile: bool = False,  # noqa: A002
        state=None,
    ) -> None:
        """Takes one step.

        Args:
            gradients: One for each variable.
            condition: A scalar; where it is false variables and slots stay, and the step counts.
            compile: Whether to compile the update of large variables (see `nvae_tf.engine.xla`).
            state: Where variables, slots and the number of steps are read and changed
                (`nvae_tf.engine.state`); default: in their variables.
        """
        state = state or VariableState()
        steps = state.value(self.iterations)
        self._apply(gradients, steps, condition, compile, state)
        state.assign(self.iterations, steps + 1)

    def _apply(self, gradients, steps, condition, compile, state) -> None:  # noqa: A002
        """Changes variables and slots; arguments as for `apply_gradients`, and the steps taken."""
        raise NotImplementedError


class StackedOptimizer(Optimizer):
    """An element-wise optimiser, which updates all weights of a shape at once.

    Args:
        learning_rate: A number, or a function from the steps taken to one.
        weight_decay: Coefficient of the decay, on every variable.
        beta_1: Decay rate of the first moment.
        beta_2: Decay rate of the second moment (of the infinity norm for Adamax).
        epsilon: Keeps the second moment above 0.
    """

    SLOTS: tuple[str, ...] = ()  # attributes that hold the slots, in the formula's order
    DECOUPLED = False  # whether weight decay is added to the update instead of the gradient

    def __init__(self, learning_rate, weight_decay, beta_1, beta_2, epsilon):
        super().__init__(learning_rate)
        self.weight_decay, self.epsilon = weight_decay, epsilon
        self.beta_1, self.beta_2 = beta_1, beta_2

    def build(self, variables) -> None:
        """Creates the slots, shaped as the variables."""
        self._variables = list(variables)
        for name in self.SLOTS:
            setattr(self, name, zeros_like(variables))

    def _apply(self, gradients, steps, condition, compile, state) -> None:  # noqa: A002
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
        for gradient, *variables in zip(gradients, self._variables, *slots, strict=True):
            update_in_state(
                self.update, state, variables, gradient, coefficients, condition, compile=compile
            )

    @staticmethod
    def update(variables, gradient, coefficients, condition, compile):  # noqa: A002
        """Changes a stack and its slots, unless the condition is false.

        Args:
            variables: The stack and its slots: variables, or tensors that stand for them.
            gradient: Gradient with respect to the stack.
            coefficients: Numbers of the formula.
            condition: A scalar.
            compile: Whether to compile the update if it is large.

        Returns:
            The new values.
        """
        raise NotImplementedError


def update_in_state(update, state, variables, *arguments, compile) -> None:  # noqa: A002
    """Changes variables by an `in_place_update`: themselves, or the tensors that stand for them."""
    if isinstance(state, VariableState):
        local = [state.local[variable] for variable in variables]
        update(local, *arguments, compile=compile)
        return
    values = update(list(map(state.value, variables)), *arguments, compile=False)
    for variable, value in zip(variables, values, strict=True):
        state.assign(variable, value)


def zeros_like(variables) -> list[tf.Variable]:
    """New variables of the same shapes, of zeros."""
    return [_variable_of_zeros(variable.shape) for variable in variables]


def _variable_of_zeros(shape) -> tf.Variable:
    if not shape.rank:
        return tf.Variable(tf.zeros(shape), trainable=False)
    # Several workers send each other a variable's initial value, and zeros are gigabytes too: only one
    # row is sent, and every worker makes the others itself.
    anything = tf.TensorShape([None, *shape[1:]])
    variable = tf.Variable(tf.zeros([1, *shape[1:]]), trainable=False, shape=anything)
    variable.assign(tf.zeros(shape))
    return variable


def in_place_update(formula):
    """An update of variables, or of tensors that stand for them.

    Compiled, it changes the variables in place. For that the formula selects between new and old values
    *before* it computes what depends on them; otherwise XLA copies the old values first.

    Args:
        formula: A function of where_applied (new, old) -> value, the values of the variables, a tensor
            of their shape, and further arguments, to the new values.

    Returns:
        A function of variables or tensors, the tensor of their shape, the further arguments, a
        condition (a scalar; where it is false nothing changes), and the keyword ``compile``: whether
        to compile it if it is large.
    """

    def update(variables, tensor, *arguments):
        *arguments, condition = arguments

        def where_applied(new, old):
            return tf.where(condition, new, old)

        before = [tf.convert_to_tensor(variable) for variable in variables]
        after = formula(where_applied, *before, tensor, *arguments)
        if isinstance(variables[0], tf.Tensor):
            return after
        for variable, value in zip(variables, after, strict=True):
            variable.assign(value)
        return []

    compiled = tf.function(update, autograph=False, jit_compile=True)

    def run(variables, tensor, *arguments, compile):  # noqa: A002
        large = tensor.shape.num_elements() >= LARGE
        return (compiled if large and compile else update)(variables, tensor, *arguments)

    return run


def _adamax(where_applied, weight, m, u, gradient, coefficients):
    rate, _, decay, beta_1, beta_2, epsilon = tf.unstack(coefficients)
    gradient = gradient + decay * weight
    m = where_applied(beta_1 * m + (1.0 - beta_1) * gradient, m)
    u = where_applied(tf.maximum(beta_2 * u, tf.abs(gradient) + epsilon), u)
    return where_applied(weight - rate * (m / u), weight), m, u


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
    update = staticmethod(in_place_update(_adamax))

    def __init__(
        self, learning_rate=1e-2, weight_decay=3e-4, beta_1=0.9, beta_2=0.999, epsilon=1e-3
    ):
        super().__init__(learning_rate, weight_decay, beta_1, beta_2, epsilon)


class Adam(StackedOptimizer):
    """Adam with L2 decay inside the gradient: Kingma & Ba, *Adam*, 2015."""

    SLOTS = ("_m", "_v")
    update = staticmethod(in_place_update(_adam))

    def __init__(
        self, learning_rate=1e-3, weight_decay=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-8
    ):
        super().__init__(learning_rate, weight_decay, beta_1, beta_2, epsilon)


class AdamW(Adam):
    """Adam with decoupled weight decay, in proportion to the learning rate.

    Reference: Loshchilov & Hutter, *Decoupled Weight Decay Regularization*, 2019.
    """

    DECOUPLED = True
    update = staticmethod(in_place_update(_adamw))


class MovingAverage(tf.Module):
    """Exponential moving averages of variables.

    Args:
        variables: Stacks of weights.
        decay: Decay of the averages per step; early on they are close to a plain mean of the steps so
            far.

    Attributes:
        stacks: The averages, one variable for each of the variables.
    """

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
        """Begins from the variables as they are, in a run that had no averages until now."""
        for average, variable in zip(self.stacks, self._variables, strict=True):
            average.assign(variable)

    def update(
        self,
        step,
        condition=True,
        compile: bool = False,  # noqa: A002
        state=None,
    ) -> None:
        """Moves the averages towards the variables.

        Args:
            step: Steps taken, this one included.
            condition: A scalar; where it is false nothing changes.
            compile: As for `Optimizer.apply_gradients`.
            state: As for `Optimizer.apply_gradients`.
        """
        state = state or VariableState()
        done = tf.cast(step, tf.float32)
        decay = tf.minimum(self.decay, (done - 1.0) / (done + 9.0))
        for average, variable in zip(self.stacks, self._variables, strict=True):
            value = state.value(variable)
            update_in_state(
                _move_average, state, [average], value, decay, condition, compile=compile
            )


@in_place_update
def _move_average(where_applied, average, value, decay):
    return [where_applied(decay * average + (1.0 - decay) * value, average)]

"""The building blocks, each against a plain statement of what it should compute."""

import inspect
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf

from nvae_tf.engine.kernels import SpectralNorms
from nvae_tf.engine.scope import Scope
from nvae_tf.engine.shared_functions import trace_key
from nvae_tf.engine.weights import Weight, assign_all, rows_of, walk, weights_below
from nvae_tf.layers import batch_norm as normalization
from nvae_tf.layers import cells, flows, latent_group
from nvae_tf.layers.base import Layer
from nvae_tf.layers.convolution import Conv2D

pytestmark = pytest.mark.core


def photo_maps(photographs, channels, size=8, batch=2):
    """Feature maps made of photographs, so that neighbouring values are similar, as in real maps."""
    values = photographs[: batch * channels, ::4, ::4, 0].astype(np.float32) / 64.0 - 2.0
    return tf.constant(
        values[:, :size, :size].reshape(batch, channels, size, size).transpose(0, 2, 3, 1)
    )


def naive_convolution(x, kernel, strides, dilation, groups):
    """By definition, in float64: symmetric zero padding of dilation * (k - 1) / 2."""
    x, kernel = np.float64(x), np.float64(kernel)
    size = kernel.shape[0]
    pad = dilation * (size - 1) // 2
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    per_group_in, per_group_out = x.shape[-1] // groups, kernel.shape[-1] // groups
    out = np.zeros((len(x), x.shape[1] // strides, x.shape[2] // strides, kernel.shape[-1]))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            top, left, reach = i * strides, j * strides, dilation * (size - 1) + 1
            patch = padded[:, top : top + reach : dilation, left : left + reach : dilation]
            for g in range(groups):
                o = slice(g * per_group_out, (g + 1) * per_group_out)
                taken = patch[..., g * per_group_in : (g + 1) * per_group_in]
                out[:, i, j, o] = np.tensordot(taken, kernel[..., o], 3)
    return out


@pytest.mark.parametrize(
    "options",
    [
        dict(filters=6, kernel_size=3),
        dict(filters=6, kernel_size=3, strides=2),
        dict(filters=6, kernel_size=1, strides=2),
        dict(filters=6, kernel_size=3, dilation=2),
        dict(filters=6, kernel_size=3, dilation=2, strides=2),
        dict(filters=8, kernel_size=5, groups=4, weight_norm=False),
        dict(filters=8, kernel_size=5, groups=4, strides=2, weight_norm=False),
        dict(filters=None, kernel_size=5),
        dict(filters=None, kernel_size=5, strides=2),
    ],
)
def test_convolution_and_its_gradient(options, photographs):
    x = photo_maps(photographs, 4)
    layer = Conv2D(**options)
    layer.build(x.shape)
    layer.bias.assign(tf.range(0.0, 1.0, 1.0 / layer.bias.shape[0])[: layer.bias.shape[0]])
    with tf.GradientTape() as tape:
        tape.watch(x)
        out = layer(x)
        loss = tf.reduce_sum(tf.sin(out))
    groups = 4 if options["filters"] is None else options.get("groups", 1)
    kernel = layer.kernel.numpy().astype(np.float64)
    if layer.weight_norm:
        norm = np.sqrt((kernel**2).sum((0, 1, 2)))
        np.testing.assert_allclose(layer.log_norm, np.log(norm + 1e-2), rtol=1e-5)
        kernel = np.exp(np.float64(layer.log_norm)) * kernel / (norm + 1e-5)
    strides, dilation = options.get("strides", 1), options.get("dilation", 1)

    def expected(x):
        return naive_convolution(x, kernel, strides, dilation, groups) + layer.bias.numpy()

    np.testing.assert_allclose(out, expected(x.numpy()), rtol=1e-4, atol=1e-5)
    direction = np.random.default_rng(0).normal(size=x.shape)
    step = 1e-6
    ahead, behind = (np.sin(expected(x.numpy() + s * direction)).sum() for s in (step, -step))
    derivative = (tape.gradient(loss, x).numpy() * direction).sum()
    np.testing.assert_allclose(derivative, (ahead - behind) / (2 * step), rtol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
def test_shared_kernels_and_their_gradients_are_the_layers_own(photographs, compiled):
    x = photo_maps(photographs, 4)
    options = [
        {},
        {},
        dict(weight_norm=False),
        dict(mask="causal"),
        dict(mask="causal", mirror=True),
    ]
    layers = [Conv2D(4, 3, **o) for o in options]
    for layer in layers:
        layer.build(x.shape)
    variables = [v for layer in layers for v in layer.trainable_variables]
    weights = [weight for layer in layers for weight in weights_below(layer)]
    spectral = SpectralNorms(layers)
    assert [len(group) for group in spectral.groups] == [2, 1, 2]

    def loss(total, scope):
        outputs = [tf.reduce_sum(tf.sin(layer(x, scope=scope))) for layer in layers]
        return tf.add_n(outputs) + 3.0 * total

    with tf.GradientTape() as tape:
        tensors = {variable.ref(): tf.convert_to_tensor(variable) for variable in variables}
        total, kernels, vectors = spectral.normalized_kernels(tensors, compiled)
        scope = Scope(values=rows_of(weights, tensors), kernels=kernels, custom_gradients=True)
        shared = loss(total, scope)
    gradients = tape.gradient(shared, variables)

    left, right = ([v for stack in half for v in stack] for half in (vectors[:3], vectors[3:]))
    with tf.GradientTape() as tape:
        norms = [
            tf.einsum("i,io,o", v, tf.reshape(layer.effective_kernel(Scope()), [-1, 4]), u)
            for layer, u, v in zip(sum(spectral.groups, []), left, right, strict=True)
        ]
        separate = loss(tf.add_n(norms), Scope())
    np.testing.assert_allclose(shared, separate, rtol=1e-5)
    expected = tape.gradient(separate, variables)
    for actual, wanted in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_data_initialization_leaves_mean_0_and_stddev_a_fifth(precision, error, photographs):
    x = photo_maps(photographs, 4)
    layer = Conv2D(6, 3, data_init=True)
    before = layer(x).numpy()
    assert layer(tf.cast(x, precision), scope=Scope(data_initialization=True)).dtype == precision
    out = layer(x).numpy().reshape(-1, 6)
    np.testing.assert_allclose(out.mean(0), 0.0, atol=error)
    np.testing.assert_allclose(out.std(0, ddof=1), 0.2, rtol=max(error, 1e-3))
    assert not np.allclose(before.reshape(-1, 6).std(0), 0.2, rtol=0.1)


@pytest.mark.parametrize("size", [1, 4, 7])
def test_doublings(size, photographs):
    x = photo_maps(photographs, 2)[:, :size, :size]
    aligned = tf.compat.v1.image.resize_bilinear(x, [2 * size] * 2, align_corners=True)
    np.testing.assert_allclose(cells.bilinear_x2(x), aligned, rtol=1e-4, atol=1e-5)
    nearest = np.repeat(np.repeat(x.numpy(), 2, 1), 2, 2)
    np.testing.assert_array_equal(cells.nearest_x2(x), nearest)


def test_batch_norm_statistics(photographs):
    x = photo_maps(photographs, 3)
    layer = normalization.BatchNormAct("swish")
    scope = Scope(training=True)
    out = layer(x, scope=scope).numpy()
    normalization.update_running_averages(scope.statistics)
    flat = x.numpy().reshape(-1, 3).astype(np.float64)
    normal = (x.numpy() - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(out, normal / (1 + np.exp(-normal)), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layer.moving_mean, 0.05 * flat.mean(0), rtol=1e-4, atol=1e-6)
    running = 0.95 + 0.05 * flat.var(0, ddof=1)
    np.testing.assert_allclose(layer.moving_variance, running, rtol=1e-4)
    evaluated = layer(x).numpy()
    normal = (x.numpy() - 0.05 * flat.mean(0)) / np.sqrt(running + 1e-5)
    np.testing.assert_allclose(evaluated, normal / (1 + np.exp(-normal)), rtol=1e-3, atol=1e-4)


def test_batch_norm_of_two_replicas_is_that_of_their_joint_batch():
    script = """
        import numpy as np, tensorflow as tf
        from sklearn.datasets import load_digits
        from nvae_tf.engine.replicas import replica_row
        from nvae_tf.engine.scope import Scope
        from nvae_tf.layers.batch_norm import BatchNormAct
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        x = np.float32(load_digits().images[:8, :, :, None])
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        with strategy.scope():
            replicated = BatchNormAct()
            replicated.build((None, 8, 8, 1))
        halves = strategy.experimental_distribute_values_from_function(
            lambda context: tf.constant(x[4 * context.replica_id_in_sync_group :][:4]))
        def step(half):
            scope = Scope(training=True, replica_row=replica_row())
            return replicated(half, scope=scope), scope.statistics[replicated]
        out, seen = tf.function(lambda parts: strategy.run(step, [parts]))(halves)
        out = tf.concat(strategy.experimental_local_results(out), 0)
        joint, scope = BatchNormAct(), Scope(training=True)
        np.testing.assert_allclose(out, joint(x, scope=scope), rtol=1e-4, atol=1e-5)
        for half in strategy.experimental_local_results(seen):
            np.testing.assert_allclose(half, scope.statistics[joint], rtol=1e-5)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("latents", [1, 3])
def test_flow_is_autoregressive_in_raster_order(mirror, latents):
    shift = flows.MaskedShift(mirror=mirror)
    z = tf.random.stateless_normal((1, 4, 4, latents), (1, 2))
    with tf.GradientTape() as tape:
        tape.watch(z)
        mu = shift(z)
    jacobian = tape.jacobian(mu, z).numpy().reshape(16 * latents, 16 * latents)
    if mirror:  # the raster order turns around, the channels of a pixel keep theirs
        turned = jacobian.reshape(16, latents, 16, latents)[::-1, :, ::-1]
        jacobian = turned.reshape(jacobian.shape)
    assert np.all(jacobian[np.triu_indices_from(jacobian)] == 0.0)
    reached = np.abs(jacobian[-latents:, :]).sum(0) > 0
    assert reached[:-latents].any()


def test_flow_inverts_and_preserves_volume():
    cell = flows.IAFCell()
    z = 2.0 * tf.random.stateless_normal((2, 4, 4, 3), (3, 4))
    cell.build(z.shape)
    for bijector in cell.bijectors(Scope()):
        moved = bijector.forward(z)
        assert np.abs(moved - z).max() > 1e-3
        # A copy, so that TFP cannot answer from what it remembers of the forward pass.
        np.testing.assert_allclose(bijector.inverse(tf.identity(moved)), z, atol=1e-5)
        np.testing.assert_array_equal(bijector.forward_log_det_jacobian(z, 3), 0.0)
    first, second = cell.bijectors(Scope())
    np.testing.assert_allclose(cell(z), second.forward(first.forward(z)), atol=1e-6)


LAYERS = [
    (Conv2D(6, 3, strides=2, use_bias=False), 4),
    (Conv2D(None, 5, mask="causal", mirror=True, log_norm_shift=-1.0), 4),
    (normalization.BatchNormAct("elu"), 4),
    (cells.ResidualCell(("res_bnswish", "res_bnswish5"), 8, "down"), 4),
    (cells.ResidualCell(("mconv_e3k5g8",), 4, "up", use_se=False), 8),
    (cells.SqueezeExcitation(), 4),
    (flows.IAFCell(), 4),
]


@pytest.mark.parametrize(("layer", "channels"), LAYERS, ids=lambda v: getattr(v, "name", v))
def test_layers_rebuild_from_their_configuration(layer, channels, photographs):
    x = photo_maps(photographs, channels)
    expected = layer(x)
    rebuilt = type(layer).from_config(layer.get_config())
    rebuilt.build(x.shape)
    rebuilt.set_weights(layer.get_weights())
    np.testing.assert_allclose(rebuilt(x), expected, rtol=1e-6, atol=1e-6)
    assert layer.compute_output_shape(x.shape)[-1] == expected.shape[-1]


def test_latent_group_rebuilds_from_its_configuration():
    group = latent_group.LatentGroup(False, (4, 4, 3), 8, 8, ("mconv_e3k5g0",), 1, True, True, 1)
    rebuilt = latent_group.LatentGroup.from_config(group.get_config())
    group.build((None, None, None, 8))
    rebuilt.build((None, None, None, 8))
    shapes = [w.shape for w in group.get_weights()]
    assert shapes and shapes == [w.shape for w in rebuilt.get_weights()]


# Another value of every argument, for each kind of layer: (the layer, what may change).
CHANGES = [
    (
        Conv2D(8, 3),
        dict(filters=4, kernel_size=5, strides=2, dilation=2, groups=2, use_bias=False,
             weight_norm=False, mask="causal", mirror=True, log_norm_shift=1.0, data_init=True),
    ),
    (normalization.BatchNormAct("elu"), dict(activation="swish")),
    (
        cells.ResidualCell(("res_bnswish",), 8),
        dict(operations=("res_bnelu",), filters=4, direction="up", use_se=False),
    ),
    (
        cells.NormActConv(8, True, "elu", 1, "normal"),
        dict(filters=4, normalization=False, activation="swish", dilation=2, direction="up"),
    ),
    (
        cells.MBConv(8, 3, 5, 0, "normal"),
        dict(filters=4, expansion=6, kernel_size=3, groups=8, direction="up"),
    ),
    (cells.SqueezeExcitation(), {}),
    (cells.SkipDown(8), dict(filters=4)),
    (cells.SkipUp(8), dict(filters=4)),
    (flows.MaskedShift(), dict(mirror=True)),
    (flows.IAFCell(), {}),
    (
        latent_group.LatentGroup(False, (4, 4, 3), 8, 8, ("mconv_e3k5g0",), 1, True, True, 1),
        dict(first=True, latent_shape=(4, 4, 2), filters_enc=4, filters_dec=4,
             operations=("mconv_e6k5g0",), num_cells=2, use_se=False, res_dist=False, num_flows=0,
             stddev="softplus"),
    ),
]  # fmt: skip


def kinds_of(kind):
    for other in kind.__subclasses__():
        yield other
        yield from kinds_of(other)


def test_no_layer_is_missing_from_those_changes():
    ours = {kind for kind in kinds_of(Layer) if kind.__module__.startswith("nvae_tf.layers")}
    ours -= {cells._FixedWidthLayer}  # a base class
    assert {type(layer) for layer, _ in CHANGES} == ours


@pytest.mark.parametrize(("layer", "changes"), CHANGES, ids=lambda v: getattr(v, "name", ""))
def test_every_argument_of_a_layer_changes_the_key_of_its_functions(layer, changes):
    arguments = set(inspect.signature(type(layer).__init__).parameters) - {"self", "kwargs"}
    assert set(changes) == arguments
    rebuilt = type(layer).from_config(layer.get_config())
    assert trace_key(rebuilt) == trace_key(layer) and hash(trace_key(layer))
    keys = {trace_key(layer)}
    for name, value in changes.items():
        keys.add(trace_key(type(layer).from_config({**layer.get_config(), name: value})))
    assert len(keys) == 1 + len(changes)
    assert all(
        trace_key(other) not in keys for other, _ in CHANGES if type(other) is not type(layer)
    )


def test_weights_of_a_shape_are_rows_of_one_variable(photographs):
    cell = cells.ResidualCell(("res_bnswish", "res_bnswish"), 4)
    x = photo_maps(photographs, 4)
    before = cell(x)
    contents = dict(walk(cell))
    names = [name for name, content in contents.items() if isinstance(content, Weight)]
    assert "branch/0/convolution/kernel" in names and "se/expand_bias" in names
    shapes = {(weight.kind, tuple(weight.shape)) for weight in weights_below(cell)}
    assert len(cell.variables) == len(shapes) < len(names)
    kernel = contents["branch/1/convolution/kernel"]
    other = contents["branch/0/convolution/kernel"].numpy()
    kernel.assign(2.0 * kernel.numpy())
    np.testing.assert_array_equal(contents["branch/0/convolution/kernel"].numpy(), other)
    np.testing.assert_allclose(cell(x), before, atol=1e-5)  # weight norm takes the factor away
    assign_all({weight: np.zeros(weight.shape) for weight in weights_below(cell)})
    np.testing.assert_allclose(cell(x), x, atol=1e-6)  # the skip alone
    with pytest.raises(ValueError, match="cannot hold"):
        kernel.assign(np.zeros(3))

"""Options of training that were published after the paper, each against its formula."""

import dataclasses
import sys

import numpy as np
import pytest
import tensorflow as tf

import nvae_tf
from nvae_tf import config as configuration
from nvae_tf import objective
from nvae_tf.cli.train import main
from nvae_tf.config import DataConfig, ModelConfig, TrainConfig, check_value
from nvae_tf.data import catalog
from nvae_tf.distributions import DiscretizedLogisticMixture, clamped_normal, minimum_log_scale
from nvae_tf.io.errors import ConfigError, UserError
from nvae_tf.training.norm_bound import FIRST_STEPS, GradientNormBound

pytestmark = pytest.mark.core


def test_the_kl_coefficient_stops_at_its_maximum():
    config = TrainConfig(kl_max_coeff=0.7, kl_anneal_portion=0.5, kl_const_portion=0.1)
    beta = np.array([float(objective.kl_coefficient(step, 100, config)) for step in range(101)])
    steps = np.arange(101)
    np.testing.assert_allclose(beta, np.clip((steps - 10) / 50, 1e-4, 0.7), rtol=1e-5)


def test_balancing_and_annealing_end_with_the_rise_of_the_coefficient(photographs):
    """At the maximum every group has the weight beta, and lambda is what the recipe says."""
    config = dict(kl_max_coeff=0.7, kl_anneal_portion=0.0, kl_const_portion=0.0)
    config.update(weight_decay_norm=0.1, weight_decay_norm_anneal=True, jit_compile="off")
    small = dict(num_latent_scales=1, num_groups_per_scale=2, num_channels_enc=4, num_mixture_dec=2)
    model = nvae_tf.NVAE(image=(32, 32, 3), num_channels_dec=4, **small)
    model.compile(**config)
    trainer = model.fitting.trainer
    trainer.config = dataclasses.replace(trainer.config, kl_const_coeff=1e-4, **config)
    trainer.total_steps = 100
    images = photographs[:4].astype(np.float32) / 255.0
    beta, regularization = trainer._coefficients(tf.constant(50, tf.int64))
    losses = trainer.losses_and_gradients(
        images, model.draw_noise(4, 1), beta, regularization
    ).losses
    assert float(beta) == pytest.approx(0.7) and float(regularization) == pytest.approx(0.1)
    np.testing.assert_array_equal(losses.gamma, [1.0, 1.0])
    expected = np.mean(losses.recon + 0.7 * tf.reduce_sum(losses.kl_per_group, 1))
    expected += 0.1 * float(losses.spectral + losses.batch_norm)
    assert float(losses.loss) == pytest.approx(expected, rel=1e-5)


def test_softplus_deviations_follow_their_formula():
    raw = np.linspace(-12, 12, 49).astype(np.float32)
    normal = clamped_normal(np.zeros_like(raw), raw, 0.5, "softplus")
    clamped = 5 * np.tanh(raw.astype(np.float64) / 5)
    expected = 0.5 * (np.log1p(np.exp(np.log(2) * clamped)) / np.log(2) + 0.01)
    np.testing.assert_allclose(normal.stddev(), expected, rtol=1e-5)
    assert float(clamped_normal(0.0, 0.0, stddev="softplus").stddev()) == pytest.approx(1.01)


def test_a_model_with_softplus_deviations_uses_them_everywhere(photographs):
    small = dict(num_latent_scales=1, num_groups_per_scale=2, num_channels_enc=4, num_mixture_dec=2)
    model = nvae_tf.NVAE(
        image=(32, 32, 3), num_channels_dec=4, res_dist=True, latent_stddev="softplus", **small
    )
    images = photographs[:2].astype(np.float32) / 255.0
    deviations = [latent.stddev.numpy() for latent in model.encode(images)]
    assert max(d.max() for d in deviations) < np.log2(1 + 2**5) + 0.02
    rebuilt = nvae_tf.NVAE.from_config(model.get_config())
    rebuilt.set_weights(model.get_weights())
    np.testing.assert_array_equal(rebuilt.encode(images)[1].stddev, deviations[1])
    exp = nvae_tf.NVAE(image=(32, 32, 3), num_channels_dec=4, res_dist=True, **small)
    exp.set_weights(model.get_weights())
    assert not np.allclose(exp.encode(images)[1].stddev, deviations[1])
    np.testing.assert_array_less(model.sample(2), 1.001)


@pytest.mark.parametrize(("bits", "scale"), [(8, -7.0), (5, -4.893), (1, -1.459), (16, -12.549)])
def test_the_smallest_scale_follows_the_bits(bits, scale):
    assert minimum_log_scale(bits, "auto") == pytest.approx(scale, abs=1e-3)
    parameters = tf.fill((1, 1, 1, 20), -50.0)
    distribution = DiscretizedLogisticMixture(parameters, bits, min_log_scale="auto")
    np.testing.assert_allclose(distribution.log_scales, scale, atol=1e-3)
    official = DiscretizedLogisticMixture(parameters, bits)
    np.testing.assert_allclose(official.log_scales, min(scale, -7.0), atol=1e-3)
    lower = DiscretizedLogisticMixture(parameters, bits, min_log_scale=-9.5)
    np.testing.assert_allclose(lower.log_scales, -9.5)


def test_a_running_bound_skips_what_is_far_above_the_typical_norm():
    bound, rng = GradientNormBound(), np.random.default_rng(0)
    run = tf.function(
        lambda norm, finite: (bound.allows(norm), bound.update(norm, finite))[0], autograph=False
    )

    def step(norm, finite=True):
        return bool(run(tf.constant(norm, tf.float32), tf.constant(finite)))

    norms = np.exp(rng.normal(np.log(300.0), 0.2, 600))
    assert all(step(norm) for norm in norms)
    logs = np.log(norms)
    assert float(bound.mean) == pytest.approx(logs[-300:].mean(), abs=0.1)
    assert float(bound.deviation) == pytest.approx(np.abs(logs - logs.mean()).mean(), abs=0.05)
    before = float(bound.mean)
    assert not step(1e6) and step(290.0)
    assert float(bound.mean) == pytest.approx(before, abs=0.02)  # an outlier hardly moves it
    values = [float(variable) for variable in (bound.mean, bound.deviation, bound.steps)]
    step(np.nan, finite=False)
    assert values == [float(variable) for variable in (bound.mean, bound.deviation, bound.steps)]
    assert step(9.0 * 300) and not step(30.0 * 300)
    fresh = GradientNormBound()
    assert bool(fresh.allows(tf.constant(1e30))) and FIRST_STEPS == 100


def test_options_are_keys_with_a_word_or_a_number():
    assert check_value("skip_gradient_norm", "auto") == "auto"
    assert check_value("skip_gradient_norm", "250") == 250.0
    assert check_value("min_log_scale", "-9") == -9.0
    for name, value in (("skip_gradient_norm", "-1"), ("min_log_scale", "wide")):
        with pytest.raises(ConfigError, match=f"{name}: .* auto or a number"):
            check_value(name, value)


@pytest.mark.slow
def test_a_run_may_begin_to_use_a_running_bound(recipe, tmp_path):
    arguments = ["--config", str(recipe), "--root", str(tmp_path)]
    assert main([*arguments, "--epochs", "1"]) == 0
    more = ["--epochs", "2", "--cont_training", "--skip_gradient_norm", "auto"]
    assert main([*arguments, *more]) == 0
    assert "skip_gradient_norm: auto" in (tmp_path / "tiny" / "config.yaml").read_text()


def test_every_option_is_off_unless_it_is_asked_for():
    assert (ModelConfig().latent_stddev, ModelConfig().min_log_scale) == ("exp", "official")
    assert (TrainConfig().kl_max_coeff, TrainConfig().skip_gradient_norm) == (1.0, 0.0)
    for name in nvae_tf.list_recipes():
        assert configuration.load(name).train.ema_decay == 0.0


def test_photos_are_split_by_photograph():
    pytest.importorskip("skimage")
    dataset = catalog.get_dataset_info(DataConfig(dataset="photos"))
    train, test = dataset.open("")
    assert train.images.shape == (5125, 32, 32, 3) and test.images.shape == (386, 32, 32, 3)
    assert len(np.unique(train.images)) == 256
    known = {image.tobytes() for image in train.images.numpy()}
    assert not any(image.tobytes() in known for image in test.images.numpy())
    # Neighbours overlap by half.
    np.testing.assert_array_equal(train.images[0, :, 16:], train.images[1, :, :16])


def test_photos_without_scikit_image_are_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(UserError, match="photos needs the package scikit-image: pip install"):
        catalog.get_dataset_info(DataConfig(dataset="photos")).open("")

"""The package beside Keras 3: in whatever order they are imported, both work."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

FIRST = {
    "nvae_tf": "import nvae_tf",
    "tensorflow": "import tensorflow",
    "tf.keras in use": "import tensorflow as tf; tf.keras.layers.Dense(1)(tf.zeros((1, 1)))",
    "keras": "import keras; keras.layers.Dense(1)",
    "tf_keras": "import tf_keras; tf_keras.layers.Dense(1)",
    "nvae_tf, then keras": "import nvae_tf, keras",
}

# A small model samples and scores; the process has the Keras that it would have without the package.
SCRIPT = """
import os
before = os.environ.get("TF_USE_LEGACY_KERAS")
{first}
from nvae_tf.config import ModelConfig
from nvae_tf.image_spec import ImageSpec
from nvae_tf.model import NVAE
import tensorflow as tf, tensorflow_probability as tfp, tf_keras

small = dict(num_groups_per_scale=2, num_latent_per_group=2, num_channels_enc=4, num_channels_dec=4,
             num_preprocess_cells=1, num_postprocess_cells=1, num_nf=1, use_se=True)
scores = []
for _ in range(2):
    tf_keras.utils.set_random_seed(3)
    model = NVAE(ModelConfig(**small), ImageSpec(32, 32, 3))
    images = model.sample(2, temperature=0.7)
    output = model(images, model.draw_noise(2, seed=(1, 0)))
    scores.append(model.log_likelihood(output.parameters, images).numpy())
assert isinstance(model, tf_keras.Model) and model.num_parameters > 1000
assert images.shape == (2, 32, 32, 3)
assert (scores[0] == scores[1]).all() and (scores[0] < 0).all(), scores

layer = tfp.layers.DistributionLambda(lambda mean: tfp.distributions.Normal(mean, 1.0))
assert layer(tf.zeros((2, 3))).log_prob(1.0).shape == (2, 3)
assert os.environ.get("TF_USE_LEGACY_KERAS") == before
print("tf.keras:", tf.keras.layers.Layer.__module__.split(".")[0])
"""


def keras_of(first: str, legacy: str | None) -> str:
    """The package that ``tf.keras`` shows after the script, run in a new process."""
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    if legacy:
        environment["TF_USE_LEGACY_KERAS"] = legacy
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(first=first)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split("tf.keras: ")[1].strip()


@pytest.mark.parametrize(
    "first",
    [
        *("nvae_tf", "nvae_tf, then keras", "keras"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tensorflow", "tf.keras in use", "tf_keras")
        ),
    ],
)
def test_any_order_of_imports(first):
    assert keras_of(FIRST[first], legacy=None) == "keras"


@pytest.mark.parametrize("first", ["nvae_tf", pytest.param("tf_keras", marks=pytest.mark.slow)])
def test_any_order_where_the_process_chose_tf_keras(first):
    assert keras_of(FIRST[first], legacy="1") == "tf_keras"


ONEDNN = """
import os
{first}
import nvae_tf
print(os.environ.get("TF_ENABLE_ONEDNN_OPTS"))
"""


@pytest.mark.parametrize(
    ("first", "setting", "expected"),
    [("", None, "1"), ("", "0", "0"), ("import tensorflow", None, "None")],
    ids=["not set", "set by the user", "too late to matter"],
)
def test_onednn_is_on_unless_the_process_says_otherwise(first, setting, expected):
    environment = {k: v for k, v in os.environ.items() if k != "TF_ENABLE_ONEDNN_OPTS"}
    if setting:
        environment["TF_ENABLE_ONEDNN_OPTS"] = setting
    done = subprocess.run(
        [sys.executable, "-c", ONEDNN.format(first=first)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    assert done.stdout.strip() == expected

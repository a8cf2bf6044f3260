"""Compares the model with reference numbers of the official implementation.

    python tests/parity.py FILE.npz [FILE.npz ...] [--jit_compile off] [--gradient_checkpointing cells]

With a checkpoint FILE.pt in place of FILE.npz, the weights come from it, and the numbers from the
FILE.npz beside it.

Builds the model from the file's configuration, loads its weights, runs the evaluation pass, the
sampling pass and the training steps with the file's noise, and compares every quantity in the file.
Prints one line for each quantity and exits with status 1 if any exceeds its tolerance.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nvae_tf import torch_import
from nvae_tf.cli.flags import Parser, add_key_flags, overrides
from nvae_tf.config import TrainConfig
from nvae_tf.engine.weights import rows_of, weights_below
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError

# After Python's own modules but before TensorFlow: nvae_tf chooses the Keras that TensorFlow shows.
import tensorflow as tf  # isort: skip

from nvae_tf.distributions import mean_image
from nvae_tf.layers.latent_group import FromPrior
from nvae_tf.model import NVAE
from nvae_tf.training.optimizers import Adamax
from nvae_tf.training.trainer import Trainer

FORWARD = 1e-4  # of the quantity's largest entry
GRADIENT, GRADIENT_OF_MODEL = 1e-3, 1e-5  # of the tensor's, and of the whole model's, largest entry
STATE, STATE_ABSOLUTE = 5e-3, 5e-4  # of the tensor's largest entry, or absolute
REGULARIZATION = 1e-2  # lambda in the files' training steps

# Data sets of the official configurations; colour is the rule.
IMAGES = {
    "mnist": (32, 1, True, (28, 28)),
    "omniglot": (32, 1, True, (28, 28)),
    "stacked_mnist": (32, 3, False, (28, 28)),
}


class Row(NamedTuple):
    """One comparison: the largest error, relative and as a multiple of the tolerance."""

    quantity: str
    relative_error: float
    error_per_tolerance: float

    @property
    def ok(self):
        return self.error_per_tolerance <= 1.0  # False for NaN


class Comparison:
    """Collects rows, and the keys of the file that no row has used."""

    def __init__(self, file):
        self.file, self.rows, self.unused = file, [], set(file)

    def take(self, key):
        self.unused.discard(key)
        return self.file[key]

    def compare(self, key, ours, relative=FORWARD, absolute=0.0, name=None):
        theirs, ours = np.asarray(self.take(key)), np.asarray(ours)
        name = name or key
        if theirs.shape != ours.shape:
            self.rows.append(
                Row(f"{name} (shape {ours.shape}, file {theirs.shape})", np.inf, np.inf)
            )
            return
        error = np.max(np.abs(ours.astype(np.float64) - theirs), initial=0.0)
        largest = np.max(np.abs(theirs), initial=0.0)
        allowed = max(relative * largest + absolute, 1e-30)
        self.rows.append(Row(name, error / max(largest, 1e-30), error / allowed))

    def noise(self, prefix):
        count = sum(key.startswith(f"{prefix}eps/") for key in self.file)
        return [to_nhwc(self.take(f"{prefix}eps/{i}")) for i in range(count)]


def to_nhwc(array):
    return tf.constant(np.transpose(array, (0, 2, 3, 1)))


def to_nchw(tensor):
    return np.transpose(tensor.numpy(), (0, 3, 1, 2))


def image_spec(flags, x):
    size, channels, binary, scored = IMAGES.get(
        flags["dataset"], (x.shape[2], x.shape[1], False, None)
    )
    return ImageSpec(size, size, channels, binary=binary, scored_size=scored)


def run(path, **settings):
    """Compares one file.

    Args:
        path: Path of an .npz file with reference numbers, or of the .pt file beside one.
        **settings: Fields of `TrainConfig` that must not change any number.

    Returns:
        The rows of the table.
    """
    path = Path(path)
    with np.load(path.with_suffix(".npz")) as archive:
        file = {key: archive[key] for key in archive.files}
    comparison = Comparison(file)
    flags = json.loads(str(comparison.take("config")))
    images = to_nhwc(comparison.take("x"))
    model = NVAE(torch_import.model_config(flags), image_spec(flags, file["x"]))
    optimizer = Adamax(1e-2, weight_decay=3e-4)
    trainer = Trainer(model, TrainConfig(**settings), total_steps=1, optimizer=optimizer)

    state_keys = [key for key in file if key.startswith("state/")]
    state = {key.removeprefix("state/"): comparison.take(key) for key in state_keys}
    if path.suffix == ".pt":
        imported = torch_import.read(path).state
        for key in state:
            comparison.compare(f"state/{key}", imported.get(key, np.nan), 0.0)
        state = imported
    torch_import.load_state(model, state)
    load_singular_vectors(trainer.spectral, model, comparison)

    comparison.compare("eps", len(model.groups), 0.0)
    model.initialize_from_data(images, comparison.noise(""))  # res_elu: from the first batch
    compare_evaluation(comparison, model, images)
    compare_sample(comparison, model)
    comparison.compare("kl_alpha", np.float32(trainer.alphas))

    @tf.function(autograph=False)
    def run_step(*arguments):
        result = trainer.losses_and_gradients(*arguments)
        trainer.update_state(result)
        return result.losses, result.gradients

    step = 0
    while f"train/{step}/loss" in file:
        compare_step(comparison, trainer, run_step, images, step)
        step += 1
    compare_final_state(comparison, model)
    for key in sorted(comparison.unused):
        comparison.rows.append(Row(f"{key} (not compared)", np.inf, np.inf))
    return comparison.rows


def load_singular_vectors(spectral, model, comparison):
    names = {layer: name for name, layer in torch_import.official_modules(model).items()}
    for layers, left, right in zip(spectral.groups, spectral.left, spectral.right, strict=True):
        left.assign([comparison.take(f"sr_u/{names[layer]}") for layer in layers])
        right.assign(
            [
                torch_import.singular_vector(
                    comparison.take(f"sr_v/{names[layer]}"), layer.kernel.shape
                )
                for layer in layers
            ]
        )


def compare_evaluation(comparison, model, images):
    output = tf.function(model, autograph=False)(images, comparison.noise(""))
    recon = -model.log_likelihood(output.parameters, images)
    comparison.compare("eval/logits", to_nchw(output.parameters))
    comparison.compare("eval/log_q", output.log_q)
    comparison.compare("eval/log_p", output.log_p)
    comparison.compare("eval/kl_all", output.kl_per_group)
    for index, latent in enumerate(output.latents):
        per_channel = tf.reduce_mean(tf.reduce_sum(latent.kl, [1, 2]), 0)
        comparison.compare(f"eval/kl_diag/{index}", per_channel)
    comparison.compare("eval/recon", recon)
    comparison.compare("eval/log_iw", -recon - output.log_q + output.log_p)
    if "eval/mean_image" in comparison.file:
        mean = mean_image(model.image_distribution(output.parameters))
        comparison.compare("eval/mean_image", to_nchw(mean))


def compare_sample(comparison, model):
    source = FromPrior(comparison.noise("sample/"), float(comparison.take("sample/temperature")))
    comparison.compare("sample/logits", to_nchw(model.top_down(source).parameters))


def compare_step(comparison, trainer, run_step, images, step):
    prefix = f"train/{step}/"
    beta = tf.constant(float(comparison.take(prefix + "kl_coeff")))
    losses, gradients = run_step(images, comparison.noise(prefix), beta, REGULARIZATION)
    comparison.compare(prefix + "recon", losses.recon)
    comparison.compare(prefix + "kl_all", losses.kl_per_group)
    comparison.compare(prefix + "balanced_kl", beta * losses.balanced_kl)
    comparison.compare(prefix + "kl_coeffs", losses.gamma)
    comparison.compare(prefix + "kl_vals", tf.reduce_mean(losses.kl_per_group, 0))
    comparison.compare(prefix + "sr_loss", losses.spectral)
    comparison.compare(prefix + "bn_loss", losses.batch_norm)
    comparison.compare(prefix + "loss", losses.loss)
    compare_gradients(comparison, trainer, prefix + "grad/", gradients)
    trainer.optimizer.apply_gradients(gradients)


def compare_gradients(comparison, trainer, prefix, gradients):
    keys = [key for key in comparison.file if key.startswith(prefix)]
    largest = max((np.max(np.abs(comparison.file[key])) for key in keys), default=0.0)
    stacks = {v.ref(): g for v, g in zip(trainer.weights, gradients, strict=True)}
    ours = rows_of(weights_below(trainer.model), stacks)
    entries = torch_import.official_entries(trainer.model)
    for key in keys:
        official = torch_import.canonical_key(key.removeprefix(prefix))
        entry = entries.get(official)
        if entry is None or entry.weight not in ours:
            # The unused parameter of official one-group models.
            comparison.compare(key, np.zeros_like(comparison.file[key]))
            continue
        gradient = entry.to_official(ours[entry.weight].numpy())
        comparison.compare(key, gradient, GRADIENT, GRADIENT_OF_MODEL * largest)


def compare_final_state(comparison, model):
    prefix = "train/final/"
    entries = torch_import.official_entries(model)
    keys = [key for key in comparison.file if key.startswith(prefix)]
    for key in keys:
        official = torch_import.canonical_key(key.removeprefix(prefix))
        if torch_import.is_ignored(official):
            comparison.take(key)
        elif official in entries:
            ours = entries[official].to_official(entries[official].weight.numpy())
            theirs = comparison.file[key]
            relative = max(STATE, STATE_ABSOLUTE / max(np.max(np.abs(theirs)), 1e-30))
            comparison.compare(key, ours, relative)
        else:
            comparison.compare(key, comparison.file["state/" + key.removeprefix(prefix)])


def main(argv):
    """Prints the tables; returns the exit status."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", metavar="FILE", help=".npz, or the .pt beside it")
    add_key_flags(parser, ["jit_compile", "gradient_checkpointing"])
    arguments = parser.parse_args(argv)
    settings = overrides(arguments)
    failed = False
    for path in arguments.paths:
        try:
            rows = run(path, **settings)
        except (UserError, OSError, ValueError, KeyError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            return 2
        width = max(len(row.quantity) for row in rows)
        print(f"{Path(path).name}: {len(rows)} quantities")
        for row in rows:
            verdict = "ok" if row.ok else "FAILED"
            print(f"  {row.quantity:<{width}}  {row.relative_error:9.2e}  {verdict}")
        wrong = sum(not row.ok for row in rows)
        worst = max(rows, key=lambda row: row.error_per_tolerance)
        print(
            f"{Path(path).name}: {len(rows) - wrong} ok, {wrong} failed; closest to its tolerance: "
            f"{worst.quantity}, {worst.error_per_tolerance:.2g} of what is allowed"
        )
        failed |= wrong > 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

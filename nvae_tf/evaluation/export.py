"""A SavedModel that needs TensorFlow alone, in the layout that TensorFlow Serving reads."""

import shutil
import tempfile
from pathlib import Path

import tensorflow as tf

from nvae_tf.evaluation.sampling import SAMPLING_STREAM, Statistics
from nvae_tf.files import cannot_write, make_folder
from nvae_tf.layers.normalization import given_statistics
from nvae_tf.model import NVAE

SAME_TEMPERATURE = 1e-3  # temperatures that differ by less share their statistics


class Exported(tf.Module):
    """What a SavedModel of NVAE can do; every function is also a signature of the same name.

    Args:
        model: the model, in float32.
        readjusted: batch-norm statistics (see `batch_norm_statistics`) by the temperature that they
            are for.
    """

    def __init__(self, model: NVAE, readjusted: dict[float, Statistics]):
        super().__init__()
        # Variables and functions alone: a Keras model would ask for Keras when it is loaded.
        self.weights = list(model.variables)
        image = tf.TensorSpec((None, *model.image.shape), tf.float32, "images")
        latents = [
            tf.TensorSpec((None, *shape), tf.float32, f"z_{group:02d}")
            for group, shape in enumerate(model.latent_shapes)
        ]
        scalars = [
            tf.TensorSpec((), tf.int32, "batch_size"),
            tf.TensorSpec((), tf.float32, "temperature"),
            tf.TensorSpec((), tf.int32, "seed"),
        ]

        def sample(batch_size, temperature, seed):
            with given_statistics(_statistics_at(temperature, readjusted)):
                images = model.sample(
                    batch_size, temperature, seed=tf.stack([seed, SAMPLING_STREAM])
                )
            return {"images": images}

        def decode(*latents):
            return {"images": model.decode(latents)}

        def encode(images):
            found = model.encode(images)
            outputs = {
                f"{name}_{group:02d}": getattr(latent, name)
                for group, latent in enumerate(found)
                for name in ("z", "mean", "deviation")
            }
            return {**outputs, "kl": tf.stack([latent.kl_per_image for latent in found], 1)}

        def reconstruct(images):
            return {"images": model.reconstruct(images)}

        def compiled(function, signature):
            return tf.function(function, input_signature=signature, autograph=False)

        self.sample = compiled(sample, scalars)
        self.decode = compiled(decode, latents)
        self.encode = compiled(encode, [image])
        self.reconstruct = compiled(reconstruct, [image])


def export(model: NVAE, readjusted: dict[float, Statistics], folder: Path) -> Path:
    """Writes the SavedModel as the next version in a folder: ``folder/1``, ``folder/2``, ...

    Args:
        model: the model.
        readjusted: as for `Exported`.
        folder: of all versions.

    Returns:
        The version's folder, complete from the moment that it is there.

    Raises:
        UserError: it cannot be written.
    """
    make_folder(folder)
    module = Exported(model, readjusted)
    names = ("sample", "decode", "encode", "reconstruct")
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=".part"))
        signatures = {name: getattr(module, name) for name in names}
        tf.saved_model.save(module, str(temporary), signatures=signatures)
        temporary.chmod(0o755)
        numbers = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]
        version = folder / str(max(numbers, default=0) + 1)
        return temporary.rename(version)
    except (OSError, tf.errors.OpError) as error:
        raise cannot_write(folder, error) from None
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)


def _statistics_at(temperature, readjusted: dict[float, Statistics]) -> dict:
    """The statistics for a temperature, a tensor: readjusted ones if it is one of those, or none."""
    chosen = {}
    for at, statistics in readjusted.items():
        here = tf.abs(temperature - at) < SAME_TEMPERATURE
        for layer, of_samples in statistics.items():
            otherwise = chosen.get(layer, (layer.moving_mean, layer.moving_variance))
            chosen[layer] = tuple(
                tf.where(here, *pair) for pair in zip(of_samples, otherwise, strict=True)
            )
    return chosen

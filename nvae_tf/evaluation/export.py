"""A SavedModel that needs TensorFlow alone, in the layout that TensorFlow Serving reads."""

import dataclasses
from pathlib import Path

import tensorflow as tf

from nvae_tf.engine.scope import Scope
from nvae_tf.evaluation.sampling import SAMPLING_STREAM, Statistics
from nvae_tf.io.files import make_folder, temporary_folder, write_error
from nvae_tf.layers.latent_group import FromPosterior, FromPrior, GroupOutput
from nvae_tf.model import NVAE

SAME_TEMPERATURE = 1e-3  # temperatures that differ by less share their statistics
SIGNATURES = ("sample", "generate", "decode", "encode", "reconstruct")


class StorablePosterior(FromPosterior):
    """Latents from the posterior, with their KL in operations that every format can store.

    TensorFlow Probability's KL between normals has an Expm1, which ONNX lacks. Here it is written out;
    nothing depends on the other any more, and converters leave it away.
    """

    def __call__(self, group, index, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its posterior."""
        latent = super().__call__(group, index, s, scope)
        if group.num_flows:  # then the KL is log q(z) - log p(z), without an Expm1
            return latent
        prior = group.prior(s, scope)
        ratio = latent.stddev / prior.scale
        shift = (latent.mean - prior.loc) / prior.scale
        kl = 0.5 * (tf.square(ratio) + tf.square(shift) - 1.0) - tf.math.log(ratio)
        return latent._replace(kl=kl)


class ServingModule(tf.Module):
    """What a SavedModel of NVAE can do; every function is also a signature of the same name.

    Functions of several tensors that are not all scalars take one dictionary, by the names that the
    signature has: so does Keras's `TFSMLayer`.

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
        temperature = tf.TensorSpec((), tf.float32, "temperature")
        scalars = [
            tf.TensorSpec((), tf.int32, "batch_size"),
            temperature,
            tf.TensorSpec((), tf.int32, "seed"),
        ]
        latents, noise = _specs(model, "z"), _specs(model, "noise")

        def scope_at(temperature):
            scope = model.scope()
            given = _statistics_at(temperature, readjusted, scope)
            return dataclasses.replace(scope, given_statistics=given)

        def sample(batch_size, temperature, seed):
            scope, seed = scope_at(temperature), tf.stack([seed, SAMPLING_STREAM])
            return {"images": model.sample(batch_size, temperature, seed=seed, scope=scope)}

        def generate(inputs):
            source = FromPrior([inputs[name] for name in noise], inputs["temperature"])
            output = model.top_down(source, scope_at(inputs["temperature"]))
            return {"images": model.render(output.parameters)}

        def decode(inputs):
            return {"images": model.decode([inputs[name] for name in latents])}

        def encode(inputs):
            drawn = [inputs[name] for name in noise]
            source = StorablePosterior(model.bottom_up(inputs["images"]), drawn)
            found = model.top_down(source)
            outputs = {
                f"{name}_{group:02d}": getattr(latent, name)
                for group, latent in enumerate(found.latents)
                for name in ("z", "mean", "stddev")
            }
            return {**outputs, "kl": found.kl_per_group}

        def reconstruct(images):
            # Not "images" again: ONNX knows tensors by their names, and has this one as the input.
            return {"reconstructions": model.reconstruct(images)}

        def compiled(function, *signature):
            return tf.function(function, input_signature=signature, autograph=False)

        self.sample = compiled(sample, *scalars)
        self.generate = compiled(generate, {"temperature": temperature, **noise})
        self.decode = compiled(decode, latents)
        self.encode = compiled(encode, {"images": image, **noise})
        self.reconstruct = compiled(reconstruct, image)


def export(model: NVAE, readjusted: dict[float, Statistics], folder: Path) -> Path:
    """Writes the SavedModel as the next version in a folder: ``folder/1``, ``folder/2``, ...

    Args:
        model: The model.
        readjusted: As for `ServingModule`.
        folder: The folder that holds all versions.

    Returns:
        The version's folder, complete from the moment that it is there.

    Raises:
        UserError: it cannot be written.
    """
    make_folder(folder)
    module = ServingModule(model, readjusted)
    signatures = {name: getattr(module, name) for name in SIGNATURES}
    with temporary_folder(folder / "export") as temporary:
        try:
            tf.saved_model.save(module, str(temporary), signatures=signatures)
        except tf.errors.OpError as error:
            raise write_error(folder, error) from None
        numbers = [int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()]
        return temporary.rename(folder / str(max(numbers, default=0) + 1))


def _specs(model: NVAE, name: str) -> dict[str, tf.TensorSpec]:
    """What one tensor a group, of the shape of its z, looks like: by names ``NAME_00``, ``NAME_01``."""
    return {
        f"{name}_{group:02d}": tf.TensorSpec((None, *shape), tf.float32, f"{name}_{group:02d}")
        for group, shape in enumerate(model.latent_shapes)
    }


def _statistics_at(temperature, readjusted: dict[float, Statistics], scope: Scope) -> dict:
    """The statistics for a temperature, a tensor: readjusted ones if it is one of those, or none."""
    chosen = {}
    for at, statistics in readjusted.items():
        here = tf.abs(temperature - at) < SAME_TEMPERATURE
        for layer, of_samples in statistics.items():
            running = scope.value(layer.moving_mean), scope.value(layer.moving_variance)
            otherwise = chosen.get(layer, running)
            chosen[layer] = tuple(
                tf.where(here, *pair) for pair in zip(of_samples, otherwise, strict=True)
            )
    return chosen

"""A SavedModel that needs TensorFlow alone, in the layout that TensorFlow Serving reads."""

import dataclasses
from pathlib import Path

import tensorflow as tf

from nvae_tf.engine.scope import Scope
from nvae_tf.evaluation.sampling import SAMPLING_STREAM, NormStatistics
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import make_folder, temporary_folder, write_error
from nvae_tf.layers.latent_group import FromPosterior, FromPrior, GroupOutput
from nvae_tf.model import NVAE

SAME_TEMPERATURE = 1e-3  # temperatures that differ by less use the same statistics
SIGNATURES = ("sample", "generate", "decode", "encode", "reconstruct")


class StorablePosterior(FromPosterior):
    """Source of latents from the posterior, whose KL uses only operations that every format can store.

    TensorFlow Probability's KL between normals uses Expm1, which ONNX does not have. Here the KL is
    written out; converters then drop the other one, which no output depends on.
    """

    def __call__(self, group, index, s, scope: Scope) -> GroupOutput:
        """Draws a group's z from its posterior."""
        output = super().__call__(group, index, s, scope)
        if group.num_flows:  # the KL is log q(z) - log p(z) then, without Expm1
            return output
        prior = group.prior(group.prior_parameters(s, scope))
        ratio = output.stddev / prior.scale
        shift = (output.mean - prior.loc) / prior.scale
        kl = 0.5 * (tf.square(ratio) + tf.square(shift) - 1.0) - tf.math.log(ratio)
        return output._replace(kl=kl)


class ServingModule(tf.Module):
    """The functions of a SavedModel of NVAE; each is also a signature of the same name.

    Functions of several tensors that are not all scalars take one dictionary, whose keys are the
    signature's names, since Keras's `TFSMLayer` calls them so.

    Args:
        model: The model, in float32.
        readjusted: Readjusted batch-norm statistics (see `batch_norm_statistics`), by temperature.
    """

    def __init__(self, model: NVAE, readjusted: dict[float, NormStatistics]):
        super().__init__()
        # The module holds variables and functions only: loading a Keras model would require Keras.
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
            group_noise = [inputs[name] for name in noise]
            source = StorablePosterior(model.bottom_up(inputs["images"]), group_noise)
            output = model.top_down(source)
            tensors = {
                f"{name}_{group:02d}": getattr(latent, name)
                for group, latent in enumerate(output.latents)
                for name in ("z", "mean", "stddev")
            }
            return {**tensors, "kl": output.kl_per_group}

        def reconstruct(images):
            # Not called "images": ONNX identifies tensors by name, and the input has that name.
            return {"reconstructions": model.reconstruct(images)}

        def traced(function, *signature):
            return tf.function(function, input_signature=signature, autograph=False)

        self.sample = traced(sample, *scalars)
        self.generate = traced(generate, {"temperature": temperature, **noise})
        self.decode = traced(decode, latents)
        self.encode = traced(encode, {"images": image, **noise})
        self.reconstruct = traced(reconstruct, image)


def export(model: NVAE, readjusted: dict[float, NormStatistics], folder: Path) -> Path:
    """Writes the SavedModel as the next version in a folder: ``folder/1``, ``folder/2``, ...

    Args:
        model: The model.
        readjusted: As for `ServingModule`.
        folder: The folder that holds all versions.

    Returns:
        The version's folder. It appears only when it is complete.

    Raises:
        UserError: The folder cannot be written, or the model does not compute in float32.
    """
    if model.precision != "float32":
        raise UserError(
            f"precision: {model.precision} cannot be exported; load the model in float32"
        )
    make_folder(folder)
    module = ServingModule(model, readjusted)
    signatures = {name: getattr(module, name) for name in SIGNATURES}
    with temporary_folder(folder / "export") as temporary:
        try:
            tf.saved_model.save(module, str(temporary), signatures=signatures)
        except tf.errors.OpError as error:
            raise write_error(folder, error) from None
        versions = [
            int(entry.name)
            for entry in folder.iterdir()
            if entry.name.isdecimal() and entry.name.isascii()
        ]
        return temporary.rename(folder / str(max(versions, default=0) + 1))


def _specs(model: NVAE, name: str) -> dict[str, tf.TensorSpec]:
    """Specifications of one tensor per group, shaped as its z, named ``NAME_00``, ``NAME_01``, ..."""
    return {
        f"{name}_{group:02d}": tf.TensorSpec((None, *shape), tf.float32, f"{name}_{group:02d}")
        for group, shape in enumerate(model.latent_shapes)
    }


def _statistics_at(temperature, readjusted: dict[float, NormStatistics], scope: Scope) -> dict:
    """The statistics of each layer for a temperature: readjusted for it if there are any, or running.

    Args:
        temperature: The temperature, a scalar tensor: the graph must choose when it runs.
        readjusted: As for `ServingModule`.
        scope: Gives the running statistics.
    """
    selected = {}
    for known_temperature, statistics in readjusted.items():
        matches = tf.abs(temperature - known_temperature) < SAME_TEMPERATURE
        for layer, (mean, variance) in statistics.items():
            running = scope.value(layer.moving_mean), scope.value(layer.moving_variance)
            other_mean, other_variance = selected.get(layer, running)
            selected[layer] = (
                tf.where(matches, mean, other_mean),
                tf.where(matches, variance, other_variance),
            )
    return selected

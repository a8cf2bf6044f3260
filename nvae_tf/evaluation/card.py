"""The model card: what a model is, what it was trained on, and the results of its evaluation."""

import itertools

from nvae_tf.evaluation.likelihood import name_of
from nvae_tf.evaluation.loading import LoadedModel
from nvae_tf.evaluation.logs import Logs, read_logs
from nvae_tf.evaluation.scores import evaluated, fid
from nvae_tf.evaluation.stored_images import value_range
from nvae_tf.io.text import counted, duration
from nvae_tf.run_folder import RunFolder
from nvae_tf.version import __version__


def text(loaded: LoadedModel, picture: str | None = None, usage: str = "") -> str:
    """The card, in Markdown.

    Args:
        loaded: The model; results that `evaluate_keras.py` left in its folder for this step are
            quoted.
        picture: Link to a picture of samples, relative to the card; default: no picture.
        usage: Paragraph on how to use the files beside the card; default: none.
    """
    config = loaded.config
    lines = [f"# NVAE on {config.data.dataset}", ""]
    if usage:
        lines += [usage, ""]
    lines += [
        "| | |",
        "| --- | --- |",
        *[f"| {name} | {value} |" for name, value in facts(loaded)],
        "",
    ]
    if picture:
        lines += ["## Samples", "", f"![samples]({picture})", ""]
    lines += [
        "## Limits",
        "",
        "The model knows the images of its data set and nothing else: it repeats their selection and "
        "their biases, and likelihoods of other images say little about them.",
        "",
        "## Configuration",
        "",
        "```yaml",
        config.to_yaml().rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def facts(loaded: LoadedModel) -> list[tuple[str, str]]:
    """Names and values of the facts about a model, results of its evaluation included."""
    return [
        *description(loaded),
        *trained(read_logs(RunFolder(loaded.folder).logs)),
        *[
            (score.name, f"{score.text()} ({score.origin})")
            for score in (*evaluated(loaded), *fid(loaded))
        ],
    ]


def trained(logs: Logs) -> list[tuple[str, str]]:
    """Names and values of the facts about how a model was trained, as far as its logs are there.

    Args:
        logs: What the logs of its run tell.
    """
    several = len(logs.sessions) > 1
    rows = [
        (f"training {number}" if several else "trained", text)
        for number, text in enumerate(logs.sessions, 1)
    ]
    if logs.seconds:
        rows.append(("time of training", duration(logs.seconds)))
    return rows


def description(loaded: LoadedModel) -> list[tuple[str, str]]:
    """Names and values of the facts about a model and its training."""
    config, model, image = loaded.config, loaded.model, loaded.model.image
    groups = " + ".join(map(str, config.model.groups_per_scale))
    runs = itertools.groupby("x".join(map(str, shape)) for shape in model.latent_shapes)
    shapes = ", then ".join(f"{len(list(run))} of {shape}" for shape, run in runs)
    low, high = value_range(image)
    values = f"{model.num_bits}-bit, values {low:,g} to {high:,g}"
    kind = "binary" if image.binary else values
    channels = counted(image.channels, "channel")
    return [
        ("model", "NVAE (Vahdat & Kautz, NeurIPS 2020), a deep hierarchical VAE"),
        ("software", f"nvae-tf {__version__}"),
        ("data set", config.data.dataset),
        ("images", f"{image.size_text} (width x height), {channels}, {kind}"),
        ("likelihood of pixels", name_of(model, model.likelihood)),
        ("latent groups", f"{groups} (finest scale first)"),
        ("latents", f"{shapes} (height x width x latents, in the order of their use)"),
        ("parameters", f"{model.num_parameters:,}"),
        ("training steps", f"{loaded.step:,}"),
    ]

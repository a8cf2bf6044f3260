"""The page as a whole: its frame and style sheet (``page.html``), filled with the sections."""

import importlib.resources
import string
from html import escape

from nvae_tf.config import data_override
from nvae_tf.evaluation.gallery import sections
from nvae_tf.evaluation.gallery.amounts import NUM_IMAGES
from nvae_tf.evaluation.gallery.content import GalleryContent, collect
from nvae_tf.evaluation.loading import load
from nvae_tf.io.text import counted
from nvae_tf.version import __version__


def build(
    run: str,
    data: str | None = None,
    seed: int = 1,
    num_images: int = NUM_IMAGES,
    command: str = "nvae_tf.evaluation.gallery",
) -> str:
    """Builds the page of a run.

    Args:
        run: Path of the run's folder, or anything else that `loading.load` takes.
        data: Path of the data set; default: its path in training.
        seed: Seed of samples and of draws of z.
        num_images: Number of test images for the KL, and for likelihoods that were not evaluated.
        command: The command that makes the page, which the page tells.

    Returns:
        The page, as HTML.

    Raises:
        UserError: There is no model, or its samples are not finite.
    """
    return render(collect(load(run, data_override(data)), seed, num_images), command)


def render(content: GalleryContent, command: str) -> str:
    """The page of what was computed.

    Args:
        content: What the page shows.
        command: The command that makes the page.
    """
    made = [(anchor, title, make(content)) for anchor, title, make in sections.SECTIONS]
    made.append(("provenance", "Provenance", sections.provenance(content, command)))
    made = [(anchor, title, body) for anchor, title, body in made if body]
    links = [f'<li><a href="#{anchor}">{title}</a></li>' for anchor, title, _ in made]
    parts = [
        f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
        f'<h2 id="{anchor}-title">{title}</h2>\n{_unbroken(body)}\n</section>'
        for anchor, title, body in made
    ]
    loaded = content.loaded
    model = loaded.model
    kind = "binary" if model.image.binary else f"{model.num_bits}-bit"
    channels = counted(model.image.channels, "channel")
    summary = (
        f"A deep hierarchical variational autoencoder (NVAE) for {kind} images of "
        f"{model.image.size_text} pixels and {channels}, with "
        f"{counted(len(model.groups), 'latent group')} and {model.num_parameters:,} parameters, "
        f"after {loaded.step:,} training steps."
    )
    frame = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return string.Template(frame).substitute(
        version=__version__,
        title=escape(f"NVAE on {loaded.config.data.dataset}"),
        summary=escape(summary),
        chosen=sections.chosen_rules(),
        scores=sections.scores(content),
        navigation="\n".join(links),
        sections="\n".join(parts),
    )


def _unbroken(body: str) -> str:
    """Keeps formulas in one line."""
    return body.replace("p(x | z)", "p(x&nbsp;|&nbsp;z)")

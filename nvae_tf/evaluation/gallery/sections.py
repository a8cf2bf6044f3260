"""The sections of the page, one function each: from what was computed to HTML.

To add a section, write a function from `GalleryContent` to HTML and add a row to `SECTIONS`; what it
needs is computed in `content`. A section without content returns nothing, and then has no heading
either.
"""

import time
from collections.abc import Callable
from html import escape
from typing import NamedTuple

import numpy as np

from nvae_tf.evaluation import card
from nvae_tf.evaluation.gallery.amounts import START, TEMPERATURE, TEMPERATURES
from nvae_tf.evaluation.gallery.charts import chart, readable
from nvae_tf.evaluation.gallery.content import GalleryContent
from nvae_tf.evaluation.gallery.from_data import RANKED, DataContent
from nvae_tf.evaluation.gallery.pictures import film_element, image_element
from nvae_tf.evaluation.scores import Score
from nvae_tf.io.machine import machine_name
from nvae_tf.objective import ACTIVE_NATS

HALF = 6  # images in a row of half a wall; on a phone the halves stand below each other
FILM_COLUMNS = 6
FRAME_MILLISECONDS = 90
SCALES = 5  # colours of scales in the style sheet


class Curve(NamedTuple):
    """How a quantity of the training is shown.

    Attributes:
        tag: Its name in the logs.
        title: Its name.
        unit: Its unit.
        logarithmic: Whether its axis is logarithmic.
    """

    tag: str
    title: str
    unit: str
    logarithmic: bool = False


CURVES = (
    Curve("elbo/nelbo", "NELBO", "nats per image"),
    Curve("elbo/bpd", "Bits per dimension", "bits"),
    Curve("elbo/recon", "Reconstruction term", "nats per image"),
    Curve("elbo/kl", "KL", "nats per image"),
    Curve("elbo/active_latents", "Active latents", "channels"),
    Curve("elbo/beta", "KL coefficient", "factor"),
    Curve("optimizer/learning_rate", "Learning rate", "per step"),
    Curve(
        "optimizer/gradient_norm",
        "Gradient norm",
        "nats per unit of weight, logarithmic",
        logarithmic=True,
    ),
    Curve("speed/images_per_second", "Speed", "images per second"),
)


def scores(content: GalleryContent) -> str:
    """The numbers that measure the model, as tiles."""
    tiles = [_score(score) for score in content.scores]
    groups = [group for group in content.groups if group.active is not None]
    if groups:
        channels = sum(group.shape[-1] for group in content.groups)
        active = sum(group.active or 0 for group in groups)
        tiles.append(
            _tile(
                "Active latents",
                f"{active} <small>of {channels}</small>",
                f"channels with a mean KL above {ACTIVE_NATS:g} nats",
            )
        )
    shown = f'<dl class="scores">{"".join(tiles)}</dl>' if tiles else ""
    return shown + _left_out(content, "scores")


def _score(score: Score) -> str:
    error = "" if score.error is None else f" <small>± {score.error:.2f}</small>"
    unit = f" <small>{escape(score.unit)}</small>" if score.unit else ""
    lines = []
    if score.per_dim:
        bits, bits_error = score.per_dim
        spread = "" if bits_error is None else f" ± {bits_error:.4f}"
        lines.append(f"{bits:.4f}{spread} bits per dimension")
    return _tile(
        escape(score.name),
        f"{score.value:.2f}{error}{unit}",
        "<br>".join([*lines, escape(score.origin)]),
    )


def _tile(name: str, number: str, detail: str) -> str:
    return (
        f'<div class="score"><dt>{name}</dt><dd><div class="number">{number}</div>'
        f'<div class="origin">{detail}</div></dd></div>'
    )


def samples(content: GalleryContent) -> str:
    """A wall of samples for each temperature, one of which is shown."""
    count = len(content.samples[TEMPERATURE])
    inputs, walls = [], []
    for number, temperature in enumerate(TEMPERATURES):
        checked = " checked" if temperature == TEMPERATURE else ""
        name = f"t-{number}"
        inputs.append(
            f'<input type="radio" name="temperature" id="{name}"{checked}>'
            f'<label for="{name}">{temperature:.1f}</label>'
        )
        images = content.samples[temperature]
        # Half of every row stands left, the other half right.
        halves = [
            [i for i in range(count) if i // HALF % 2 == side]
            for side in range(2 if count > HALF else 1)
        ]
        elements = "".join(
            image_element(images[half], HALF, f"{len(half)} samples at temperature {temperature:g}")
            for half in halves
        )
        walls.append(f'<figure class="{name}"><div class="halves">{elements}</div></figure>')
    pixels = escape(content.loaded.model.pixels_of_samples)
    return (
        f"<p>{count} samples at each temperature, which are the first ones and not a choice: {pixels}. "
        "The noise is the same at all temperatures, so that an image can be followed from one to the "
        "next.</p>"
        f'<div class="chooser" role="radiogroup" aria-label="Temperature of the samples">'
        f"<span>Temperature</span>{''.join(inputs)}{''.join(walls)}</div>"
    )


def chosen_rules() -> str:
    """The selectors of the style sheet that show the wall of the chosen temperature."""
    return ", ".join(f"#t-{n}:checked ~ .t-{n}" for n in range(len(TEMPERATURES)))


def film(content: GalleryContent) -> str:
    """Films through samples, which can be stopped."""
    count = len(content.film[0])
    alt = f"{count} films through samples at temperature {TEMPERATURE:g}"
    moving = film_element(content.film, FILM_COLUMNS, alt, FRAME_MILLISECONDS)
    frozen = image_element(content.film[0], FILM_COLUMNS, f"The first moment of {alt}")
    return (
        f"<p>Each film goes through samples at temperature {TEMPERATURE:g} and ends where it begins. "
        "Between two samples it follows an arc in the noise space of the prior, on which every "
        "image is one that the prior could have drawn. Means of p(x | z).</p>"
        '<div class="film"><input type="checkbox" id="frozen"> '
        '<label for="frozen">Stop the film</label>'
        f'<div class="moving">{moving}</div><div class="frozen">{frozen}</div></div>'
    )


def interpolations(content: GalleryContent) -> str:
    """Ways from one test image to another."""
    if not isinstance(content.data, DataContent):
        return f"<p>The data set could not be read: {escape(content.data)}</p>"
    if content.data.ways is None:
        return _left_out(content, "ways")
    pairs, ways = content.data.ways
    rows = np.concatenate([pairs[:, :1], ways, pairs[:, 1:]], 1)
    columns = rows.shape[1]
    strips = "".join(
        image_element(row, columns, "From one test image to another", (0, columns - 2))
        for row in rows
    )
    return (
        "<p>The outermost images of each row are test images. Beside them are their "
        f"reconstructions, and between those {ways.shape[1] - 2} images on an arc in the noise space "
        "of the prior. Means of p(x | z), with the posteriors' means at both ends.</p>"
        f"{_scrolled('Interpolations', strips)}"
    )


def reconstructions(content: GalleryContent) -> str:
    """Test images beside their reconstructions."""
    if not isinstance(content.data, DataContent) or content.data.reconstructions is None:
        return _left_out(content, "reconstructions")
    both = np.stack(content.data.reconstructions, 1)
    figures = "".join(
        f"<figure>{image_element(pair, 2, f'Test image {i} and its reconstruction')}</figure>"
        for i, pair in enumerate(both)
    )
    return (
        "<p>Left the first images of the test set, right their reconstructions: means of p(x | z), "
        f'with one draw of z each.</p><div class="pairs">{figures}</div>'
    )


def groups(content: GalleryContent) -> str:
    """KL, active latents and influence of each group."""
    measured = content.data.measured if isinstance(content.data, DataContent) else None
    largest = max(*(group.kl or 0.0 for group in content.groups), 0.0) or 1.0
    sizes = list(dict.fromkeys(group.shape[:2] for group in content.groups))
    rows = []
    for number, group in enumerate(content.groups):
        shape = "×".join(map(str, group.shape))
        cells = [f"<td>{number}</td><td>{shape}</td>"]
        if group.kl is not None:
            scale = sizes.index(group.shape[:2]) % SCALES
            # The estimate of a small KL from one draw of z, as flows need it, may be negative.
            width = 100.0 * max(group.kl, 0.0) / largest
            cells.append(
                f'<td class="bar"><span style="width:{width:.1f}%;background:var(--scale-{scale})">'
                f'</span></td><td class="right">{group.kl:.2f}</td>'
                f'<td class="right">{group.active} of {group.shape[-1]}</td>'
            )
        cells.append(f'<td class="right">{group.influence:.3f}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    of_data = (
        '<th scope="col" colspan="2" class="right">KL, nats</th>'
        '<th scope="col" class="right">active</th>'
        if measured
        else ""
    )
    total = sum(group.kl or 0.0 for group in content.groups)
    text = (
        f"The KL is the mean over {measured.num_images:,} test images with one draw of z each, "
        f"{total:.2f} nats over all groups. A latent channel is active, as training counts it, if its "
        f"mean KL is above {ACTIVE_NATS:g} nats. "
        if measured
        else ""
    )
    return (
        f"{_left_out(content, 'measured')}<p>Coarsest group first, one colour for each size of the "
        f"maps. {text}The last column says by how much a fresh draw of the group's noise changes a "
        "pixel (root mean square, of 1) at "
        f"temperature {TEMPERATURE:g}.</p>"
        '<table><thead><tr><th scope="col">group</th><th scope="col">shape</th>'
        f'{of_data}<th scope="col" class="right">change</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def traversals(content: GalleryContent) -> str:
    """A row of images for each group, in which its noise alone changes."""
    strips = []
    for number, row in zip(content.traversed, content.traversals, strict=True):
        shape = "×".join(map(str, content.groups[number].shape))
        element = image_element(row, len(row), f"Images as the noise of group {number} changes")
        strips.append(
            f'<figure class="strip"><figcaption><b>Group {number}</b><br>{shape}</figcaption>'
            f"{element}</figure>"
        )
    some = (
        f" {len(content.traversed)} of {len(content.groups)} groups are shown."
        if len(content.traversed) < len(content.groups)
        else ""
    )
    return (
        "<p>Along a row only the noise of one group changes: from one draw through a second to the "
        f"opposite of the first. All rows begin with sample {START + 1} of the wall, at temperature "
        f"{TEMPERATURE:g}.{some} Means of p(x | z).</p>{_scrolled('Traversals', ''.join(strips))}"
    )


def neighbours(content: GalleryContent) -> str:
    """Samples and the training images nearest to them."""
    if not isinstance(content.data, DataContent) or content.data.near is None:
        return _left_out(content, "near")
    near = content.data.near
    figures = []
    for sample, images, distances in zip(
        near.samples, near.found.images, near.found.distances, strict=True
    ):
        row = np.concatenate([sample[None], images])
        element = image_element(
            row, len(row), "A sample and the training images nearest to it", (0,)
        )
        texts = ", ".join(f"{distance:.3f}" for distance in distances)
        figures.append(f"<figure>{element}<figcaption>{texts}</figcaption></figure>")
    caution = (
        " Samples are shown as means and images as they were binarised, so that the numbers of "
        "the two do not compare exactly."
        if content.loaded.model.image.binary
        else ""
    )
    return (
        f"<p>Left a sample at temperature {TEMPERATURE:g}, right of it the nearest of "
        f"{near.searched:,} training images, with their distances: the root mean square of the "
        f"differences of pixels, of 1. For a test image the distance to the nearest one is "
        f"{near.test_distance:.3f} (median).{caution}</p>"
        f'<div class="near">{"".join(figures)}</div>'
    )


def extremes(content: GalleryContent) -> str:
    """The test images that are most and least like the training images."""
    if not isinstance(content.data, DataContent) or content.data.extremes is None:
        return _left_out(content, "extremes")
    ends = content.data.extremes
    strips = [
        f'<figure class="strip"><figcaption><b>The {name} typical</b><br>{values.min():.0f} to '
        f"{values.max():.0f}</figcaption>"
        f"{image_element(images, len(images), f'The {name} typical test images')}</figure>"
        for name, images, values in (
            ("most", ends.typical, ends.typical_scores),
            ("least", ends.untypical, ends.untypical_scores),
        )
    ]
    return (
        f"<p>Of {RANKED:,} test images at most. How typical an image is, is told by its distance from "
        "training images in reconstruction, KL of each group and what each group adds by looking at "
        f"the image (<code>--eval_mode ood</code>).</p>{_scrolled('Typical images', ''.join(strips))}"
    )


def training(content: GalleryContent) -> str:
    """The curves of the training."""
    scalars = content.logs.scalars
    figures, splits = [], {}
    for curve in CURVES:
        if curve.tag not in scalars:
            continue
        scalar = scalars[curve.tag]
        last = ", ".join(
            f"{name} {readable(points[-1][1])}" for name, points in scalar.curves.items()
        )
        drawing = chart(
            scalar.curves, f"{curve.title} by step; at the end {last}", curve.logarithmic
        )
        if drawing:
            splits.update(dict.fromkeys(scalar.curves))
            figures.append(
                f"<figure><h3>{curve.title} <span>{curve.unit}</span></h3>{drawing}"
                f"<figcaption>{escape(scalar.description)}. At the end: {last}.</figcaption></figure>"
            )
    if not figures:
        return ""
    legend = "".join(f'<span class="{escape(name)}">{escape(name)}</span>' for name in splits)
    return (
        f'<p class="legend">{legend}</p><p class="muted">By training step. Where the first points '
        "would flatten the rest of a curve, they lie outside its frame.</p>"
        f'<div class="charts">{"".join(figures)}</div>'
    )


def provenance(content: GalleryContent, command: str) -> str:
    """Where the model and the page come from."""
    loaded, logs = content.loaded, content.logs
    rows = [(name, value) for name, value in card.description(loaded)]
    rows += card.trained(logs)
    if logs.began is not None and logs.ended is not None:
        rows.append(("training's log", f"{_date(logs.began)} to {_date(logs.ended)}"))
    rows.append(("this page", f"{command}, {_date(time.time())}; {machine_name()}"))
    facts = "".join(f"<dt>{escape(n)}</dt><dd>{escape(str(value))}</dd>" for n, value in rows)
    yaml = escape(loaded.config.to_yaml().rstrip())
    return (
        f'<dl class="facts">{facts}</dl><details><summary>Configuration</summary>'
        f"<pre>{yaml}</pre></details>"
    )


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _scrolled(name: str, strips: str) -> str:
    """Rows of images that a narrow screen shows a part of, and scrolls."""
    return f'<div class="strips" role="group" aria-label="{name}" tabindex="0">{strips}</div>'


def _left_out(content: GalleryContent, part: str) -> str:
    """Why a part of what needs the data set is not shown; nothing if there is no reason to tell."""
    reasons = content.data.left_out if isinstance(content.data, DataContent) else {}
    return f"<p>Left out: {escape(reasons[part])}</p>" if part in reasons else ""


# Anchor, heading, and the function that makes the section; in the order of the page.
SECTIONS: tuple[tuple[str, str, Callable[[GalleryContent], str]], ...] = (
    ("samples", "Samples", samples),
    ("film", "From sample to sample", film),
    ("interpolations", "From image to image", interpolations),
    ("reconstructions", "Reconstructions", reconstructions),
    ("groups", "What the latent groups hold", groups),
    ("traversals", "What each group does", traversals),
    ("neighbours", "Nearest training images", neighbours),
    ("extremes", "Typical and untypical test images", extremes),
    ("training", "Training", training),
)

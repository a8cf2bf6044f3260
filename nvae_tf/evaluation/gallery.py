"""One HTML file that shows a trained model, and opens from disk without a network."""

import base64
import html
import io
import math
from pathlib import Path

import numpy as np
from PIL import Image

from nvae_tf.config import data_override
from nvae_tf.io.errors import UserError

TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0)
SAMPLES = 12  # per temperature
NUM_RECONSTRUCTED = 12  # images of the test set
NUM_ENCODED = 200  # images of the test set, for the mean KL of each group
STEPS = 12  # images in a traversal
TRAVERSAL_TEMPERATURE = 0.8
CURVES = (
    "elbo/nelbo", "elbo/bpd", "elbo/recon", "elbo/kl", "elbo/beta", "optimizer/learning_rate",
    "optimizer/gradient_norm", "elbo/active_latents",
)  # fmt: skip
MAX_POINTS = 500  # in a curve
COLOURS = ("#1f6fb2", "#d1662a", "#3b8f4b", "#8a5aa8", "#a8893b")
MIN_WIDTH = 64  # of an image on the page, in pixels

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto;
       padding: 0 1em; }}
h1 {{ margin-bottom: 0; }} h2 {{ margin-top: 2em; border-bottom: 1px solid #ccc; }}
figure {{ margin: 1em 0; }} figcaption {{ color: #555; }}
img {{ image-rendering: pixelated; max-width: 100%; }}
table {{ border-collapse: collapse; }} td {{ padding: 0.1em 1.5em 0.1em 0; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 1em; }}
svg text {{ font: 12px system-ui, sans-serif; fill: #444; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def build(run: str, data: str | None = None, seed: int = 1) -> str:
    """Builds the page of a run.

    Args:
        run: Path of the run's folder, or anything else that `loading.load` takes.
        data: Path of the data set; default: its path in training.
        seed: Seed of the samples.

    Returns:
        The page, as HTML.

    Raises:
        UserError: There is no model.
    """
    from nvae_tf.evaluation import card, latents, sampling
    from nvae_tf.evaluation.loading import load
    from nvae_tf.evaluation.stored_images import from_levels

    loaded = load(run, data_override(data))
    model, title = loaded.model, f"NVAE on {loaded.config.data.dataset}"

    facts = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in card.facts(loaded)
    )
    parts = [f"<table>{facts}</table>", "<h2>Samples</h2>"]
    options = dict(batch_size=SAMPLES, seed=seed, draw=sampling.compiled_sampler(model))
    for temperature in TEMPERATURES:
        levels, _ = sampling.sample(model, SAMPLES, temperature, **options)
        images = from_levels(levels, model.image)
        parts.append(_figure(images, SAMPLES, f"temperature {temperature:g}"))

    parts.append("<h2>Reconstructions</h2>")
    try:
        images = _test_images(loaded)
    except UserError as error:
        print(f"left out: reconstructions and KL ({error})")
        parts.append(f"<p>The test images could not be read: {html.escape(str(error))}</p>")
    else:
        originals = images[:NUM_RECONSTRUCTED]
        reconstructions = latents.reconstruct(model, originals, seed)
        parts.append(_figure(originals, NUM_RECONSTRUCTED, "test images"))
        nelbo = reconstructions.nelbo.mean()
        caption = f"mean NELBO of these {len(originals)} images {nelbo:.1f} nats"
        parts.append(_figure(reconstructions.images, NUM_RECONSTRUCTED, caption))
        (encoded,) = latents.encode_batches(model, [images], [], seed)
        kl = encoded.kl.mean(0)
        parts.append("<h2>KL of each group</h2>")
        parts.append(
            f"<p>Mean of {len(images)} test images with one draw of z each, {kl.sum():.2f} nats over "
            "all groups; coarsest group first, one colour per scale.</p>"
        )
        parts.append(bars(kl, [f"{h}x{w}x{c}" for h, w, c in model.latent_shapes]))

    parts.append("<h2>What each group does</h2>")
    parts.append(
        "<p>One row per group, coarsest first. Along a row only that group's noise changes, by half a "
        "turn; the first column is the same image in all rows.</p>"
    )
    groups = list(range(len(model.groups)))
    noise = model.draw_noise(1, (seed, 0))
    rows = latents.traverse(model, noise, groups, STEPS, TRAVERSAL_TEMPERATURE, seed)
    parts.append(
        _figure(rows.reshape(-1, *rows.shape[3:]), STEPS, f"temperature {TRAVERSAL_TEMPERATURE:g}")
    )

    curves = read_curves(loaded.folder / "logs")
    if curves:
        charts = "".join(
            f"<figure>{chart(curves[name])}<figcaption>{html.escape(name)}</figcaption></figure>"
            for name in CURVES
            if name in curves
        )
        parts.append(f'<h2>Training</h2><p>{_legend(curves)}</p><div class="charts">{charts}</div>')
    return PAGE.format(title=html.escape(title), body="\n".join(parts))


def read_curves(logs: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Reads the scalars of a run's TensorBoard logs that the page shows.

    Args:
        logs: Path of the folder that holds ``train`` and ``validation``.

    Returns:
        Points (step, value), by the scalar's name and by ``train`` or ``validation``.
    """
    import tensorflow as tf
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    curves = {}
    for split in ("train", "validation"):
        events = EventAccumulator(str(logs / split), size_guidance={TENSORS: MAX_POINTS})
        if not (logs / split).is_dir():
            continue
        events.Reload()
        for name in set(CURVES) & set(events.Tags()["tensors"]):
            points = [
                (event.step, float(tf.make_ndarray(event.tensor_proto)))
                for event in events.Tensors(name)
            ]
            finite = [point for point in points if np.isfinite(point[1])]
            if finite:
                curves.setdefault(name, {})[split] = finite
    return curves


def chart(series: dict[str, list[tuple[int, float]]]) -> str:
    """Draws curves as SVG; both axes are labelled at their ends.

    Args:
        series: Points (step, value) of each curve.
    """
    width, height, left, bottom = 360, 200, 64, 20
    points = np.concatenate([np.array(line, np.float64) for line in series.values()])
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1.0)

    def coordinates(point):
        x, y = (np.array(point) - low) / span
        return f"{left + x * (width - left - 8):.1f},{8 + (1.0 - y) * (height - bottom - 16):.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" '
        f'points="{" ".join(map(coordinates, line))}"/>'
        for colour, line in zip(COLOURS, series.values(), strict=False)
    )
    labels = (
        f'<text x="{left - 6}" y="16" text-anchor="end">{high[1]:.4g}</text>'
        f'<text x="{left - 6}" y="{height - bottom - 6}" text-anchor="end">{low[1]:.4g}</text>'
        f'<text x="{left}" y="{height - 4}">{low[0]:.0f}</text>'
        f'<text x="{width - 8}" y="{height - 4}" text-anchor="end">step {high[0]:.0f}</text>'
    )
    frame = (
        f'<rect x="{left}" y="8" width="{width - left - 8}" height="{height - bottom - 16}" '
        'fill="none" stroke="#ccc"/>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{frame}{lines}{labels}</svg>'


def bars(values, names: list[str]) -> str:
    """Draws horizontal bars as SVG, one per group.

    Args:
        values: Value of each group, in nats.
        names: Name of each group; groups of the same name have the same colour.
    """
    height, left, width = 18, 150, 900
    distinct_names = list(dict.fromkeys(names))
    largest = max(float(np.max(values)), 1e-6)
    rows = []
    for group, (value, name) in enumerate(zip(values, names, strict=True)):
        y, length = group * height, float(value) / largest * (width - left - 90)
        colour = COLOURS[distinct_names.index(name) % len(COLOURS)]
        rows.append(
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{group}: {html.escape(name)}</text>'
            f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{height - 4}" fill="{colour}"/>'
            f'<text x="{left + length + 6:.1f}" y="{y + 13}">{value:.2f} nats</text>'
        )
    return f'<svg viewBox="0 0 {width} {height * len(names)}" role="img">{"".join(rows)}</svg>'


def _legend(curves) -> str:
    splits = dict.fromkeys(split for series in curves.values() for split in series)
    return ", ".join(
        f'<span style="color:{colour}">&#9644; {html.escape(split)}</span>'
        for colour, split in zip(COLOURS, splits, strict=False)
    )


def _figure(images, columns: int, caption: str) -> str:
    from nvae_tf.io.image_grid import grid

    picture = Image.fromarray(grid(images, columns))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    width = picture.width * math.ceil(MIN_WIDTH / images.shape[2])
    encoded = base64.b64encode(content.getvalue()).decode()
    return (
        f'<figure><img width="{width}" src="data:image/png;base64,{encoded}" '
        f'alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )


def _test_images(loaded):
    """The first images of the test set."""
    from nvae_tf.data import catalog, pipeline
    from nvae_tf.data.source import reading

    dataset = catalog.get_dataset_info(loaded.config.data)
    _, test = dataset.open(loaded.config.data.data)
    batches = pipeline.evaluation_batches(
        test, dataset, batch_size=NUM_ENCODED, seed=1, num_bits=loaded.model.num_bits
    )
    with reading(test):
        return next(iter(batches)).numpy()

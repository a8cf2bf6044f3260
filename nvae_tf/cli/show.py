"""The modes of ``evaluate_keras.py`` that show latents, and those that export and describe a model.

Functions import what needs TensorFlow, which takes seconds: by then the flags are known to be right.
"""

from pathlib import Path
from typing import Any

from nvae_tf.cli.model import load, origin, statistics_at
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import atomic_write, write_animation, write_json, write_png, write_text

RECONSTRUCTED = 16  # test images, unless others are named
COLUMNS = 8
ANIMATION_WIDTH = 128  # smallest width of one image in pixels
INFLUENCE_SAMPLES = 100
CARD, CARD_SAMPLES, CARD_TEMPERATURE = ("MODEL_CARD.md", "model_card.png"), 40, 0.7


def reconstruct(arguments) -> None:
    """Writes images beside their reconstructions, with NELBO and squared error."""
    loaded, (picture, report) = load(arguments, "reconstruct.png", "reconstruct.json")
    import numpy as np

    from nvae_tf.evaluation import latents
    from nvae_tf.io.labelled_grid import labelled_grid, reconstruction_bands

    images, names = _chosen_images(arguments, loaded, max_images=RECONSTRUCTED)
    results = latents.reconstruct(loaded.model, images, arguments.seed, arguments.batch_size)
    reconstructed, columns = np.clip(results.images, 0.0, 1.0), min(COLUMNS, len(images))
    captions = [
        [f"{nelbo:.1f} nats", f"mse {mse:.4f}"]
        for nelbo, mse in zip(results.nelbo, results.mse, strict=True)
    ]
    bands = reconstruction_bands(images, reconstructed, columns, captions)
    note = f"{origin(loaded)}; means of p(x | z), one draw of z each; NELBO and squared error"
    write_png(picture, labelled_grid(bands, columns, "Images and their reconstructions", note))
    rows = zip(names, results.nelbo.tolist(), results.mse.tolist(), strict=True)
    entries = [{"image": name, "nelbo": nelbo, "mse": mse} for name, nelbo, mse in rows]
    write_json(report, entries)
    print(
        f"mean of {len(images)}: nelbo {results.nelbo.mean():.2f} nats, mse {results.mse.mean():.5f}"
    )
    print(f"written: {picture}, {report}")


def interpolate(arguments) -> None:
    """Writes rows of images from one image to another, or from one sample to another."""
    names = ("interpolate.png", f"interpolate.{arguments.animation}")
    loaded, written = load(arguments, *names)
    import numpy as np

    from nvae_tf.evaluation import latents
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    if arguments.images or arguments.indices:
        images, _ = _chosen_images(arguments, loaded)
        noise = latents.prior_noise(loaded.model, images, arguments.batch_size)
        temperature = 1.0
    else:
        count = 2 * (arguments.num_samples or 1)
        noise, temperature = loaded.model.draw_noise(count, (arguments.seed, 0)), arguments.temp
    if len(noise[0]) % 2:
        raise UserError("interpolation needs pairs of images; give an even number of them")
    start, end = ([tensor[first::2] for tensor in noise] for first in (0, 1))
    rows = latents.interpolate(
        loaded.model, start, end, arguments.steps, temperature, arguments.batch_size
    )
    ends = "image to image" if arguments.images or arguments.indices else "sample to sample"
    note = f"{origin(loaded)}; temperature {temperature:g}; means of p(x | z)"
    picture = labelled_grid(
        [Band(np.concatenate(rows))], arguments.steps, f"Interpolation from {ends}", note
    )
    frames = [
        labelled_grid([Band(rows[:, step])], min(COLUMNS, len(rows)), min_width=ANIMATION_WIDTH)
        for step in range(arguments.steps)
    ]
    write_animation(written[1], np.stack(frames))
    write_png(written[0], picture)
    print("written: " + ", ".join(map(str, written)))


def traverse(arguments) -> None:
    """Writes a row per image and group, in which only the noise of that group changes."""
    loaded, (picture, report) = load(arguments, "traverse.png", "traverse.json")
    from nvae_tf.evaluation import latents
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    model, groups = loaded.model, latent_groups(arguments, loaded.model)
    if arguments.images or arguments.indices:
        images, _ = _chosen_images(arguments, loaded)
        noise, temperature = latents.prior_noise(model, images, arguments.batch_size), 1.0
    else:
        noise, temperature = model.draw_noise(1, (arguments.seed, 0)), arguments.temp
    seed, size = arguments.seed, arguments.batch_size
    rows = latents.traverse(model, noise, groups, arguments.steps, temperature, seed, size)
    influence = latents.influence(model, INFLUENCE_SAMPLES, arguments.temp, seed, size)
    shapes = ["x".join(map(str, model.latent_shapes[group])) for group in groups]
    bands = [
        Band(row, f"group {group}\n{shape}")
        for image in rows
        for group, shape, row in zip(groups, shapes, image, strict=True)
    ]
    note = f"{origin(loaded)}; temperature {temperature:g}; means of p(x | z)"
    title = "One group's noise makes half a turn"
    write_png(picture, labelled_grid(bands, arguments.steps, title, note))
    entries = [
        {"group": group, "shape": list(shape), "influence": float(change)}
        for group, (shape, change) in enumerate(zip(model.latent_shapes, influence, strict=True))
    ]
    write_json(report, entries)
    print(f"change of a pixel (root mean square, of 1) by a fresh draw at {arguments.temp:g}:")
    for entry in entries:
        print(f"  group {entry['group']:2d} {str(entry['shape']):>16}  {entry['influence']:.4f}")
    per_image = f" of each of {len(rows)} images" if len(rows) > 1 else ""
    print(f"written: {picture} (rows: groups {groups}{per_image}), {report}")


def encode(arguments) -> None:
    """Writes the latents of images as arrays."""
    loaded, (path,) = load(arguments, "latents.npz")
    import numpy as np
    from tqdm import tqdm

    from nvae_tf.data.source import reading
    from nvae_tf.evaluation import latents

    groups = latent_groups(arguments, loaded.model)
    source, dataset, names = _source(arguments, loaded)
    batches = _batches(arguments, loaded, source, dataset, with_labels=True)
    labels: list = []

    def images():
        with tqdm(total=len(source), unit="image", desc="encode", disable=None) as bar:
            for batch, batch_labels in batches:
                labels.append(batch_labels.numpy())
                bar.update(len(batch))
                yield batch

    with reading(source):
        encoded = list(latents.encode_batches(loaded.model, images(), groups, arguments.seed))
    arrays: dict[str, Any] = {"kl": np.concatenate([batch.kl for batch in encoded])}
    for field in ("z", "mean", "stddev"):
        parts = zip(*(getattr(batch, field) for batch in encoded), strict=True)
        arrays.update(
            {f"{field}_{g:02d}": np.concatenate(p) for g, p in zip(groups, parts, strict=True)}
        )
    if arguments.images:
        arrays["names"] = np.array(names)
    else:
        arrays["labels"] = np.concatenate(labels)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    print(f"latents: {len(source)} images, groups {groups}")
    print(f"mean KL with z drawn: {arrays['kl'].sum(1).mean():.2f} nats over all groups")
    print(f"written: {path} ({', '.join(arrays)})")


def export(arguments) -> None:
    """Writes a SavedModel, with a card and a grid of samples beside it."""
    if not arguments.output:
        raise UserError("an export needs --output DIR: the folder that becomes the served model")
    loaded, (card_path, picture) = load(arguments, *CARD)
    from nvae_tf.evaluation import export as exporting

    readjusted = {
        temperature: statistics_at(arguments, loaded.model, temperature)
        for temperature in dict.fromkeys(arguments.readjust_temps)
    }
    version = exporting.export(loaded.model, readjusted, card_path.parent)
    usage = (
        "`1/` and so on are SavedModels that need only TensorFlow, with the signatures "
        + ", ".join(f"`{name}`" for name in exporting.SIGNATURES)
        + "."
    )
    if readjusted:
        temperatures = ", ".join(f"{t:g}" for t in readjusted)
        usage += f" Samples at {temperatures} use batch-norm statistics of that temperature."
    written = [version, *_write_card(arguments, loaded, card_path, picture, usage)]
    print("written: " + ", ".join(map(str, written)))


def card(arguments) -> None:
    """Writes a model card, by default into the run's folder."""
    loaded, paths = load(arguments, *CARD)
    print("written: " + ", ".join(map(str, _write_card(arguments, loaded, *paths))))


def _write_card(arguments, loaded, path: Path, picture: Path, usage: str = "") -> list[Path]:
    from nvae_tf.evaluation import card as cards
    from nvae_tf.evaluation import sampling
    from nvae_tf.evaluation.stored_images import from_levels
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    options = dict(batch_size=min(arguments.batch_size, CARD_SAMPLES), seed=arguments.seed)
    levels, _ = sampling.sample(loaded.model, CARD_SAMPLES, CARD_TEMPERATURE, **options)
    note = f"{origin(loaded)}; temperature {CARD_TEMPERATURE:g}; {loaded.model.pixels_of_samples}"
    write_png(
        picture,
        labelled_grid([Band(from_levels(levels, loaded.model.image))], COLUMNS, "Samples", note),
    )
    write_text(path, cards.text(loaded, picture.name, usage))
    return [path, picture]


def latent_groups(arguments, model) -> list[int]:
    """Returns the latent groups that the flags name."""
    groups = arguments.groups or list(range(len(model.groups)))
    wrong = [group for group in groups if group >= len(model.groups)]
    if wrong:
        raise UserError(f"--groups: there is no group {wrong[0]}; there are {len(model.groups)}")
    return list(dict.fromkeys(groups))


def _source(arguments, loaded):
    """Returns the images that the flags name: source, description of the data set, and names."""
    from nvae_tf.data import catalog
    from nvae_tf.data.images import named_images

    if arguments.images:
        dataset = catalog.given_images(loaded.model.image)
        config = loaded.config.data
        source = named_images(arguments.images, dataset.image, config.alpha, config.crop)
        return source, dataset, [item.name for item in source.items]
    dataset = catalog.get_dataset_info(loaded.config.data)
    train, test = dataset.open(loaded.config.data.data)
    source = train if arguments.eval_on_train else test
    split = "train" if arguments.eval_on_train else "test"
    return source, dataset, [f"{split} {index}" for index in range(len(source))]


def _batches(arguments, loaded, source, dataset, **options):
    from nvae_tf.data import pipeline

    return pipeline.evaluation_batches(
        source,
        dataset,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        num_bits=loaded.model.num_bits,
        **options,
    )


def _chosen_images(arguments, loaded, max_images: int | None = None):
    """Returns the images and their names: by --images or --indices, or the first of the data set."""
    import numpy as np

    from nvae_tf.data.source import reading

    source, dataset, names = _source(arguments, loaded)
    count = len(source)
    if max_images is not None and not arguments.images:
        count = min(max_images, count)
    indices = arguments.indices or range(count)
    outside = [index for index in indices if index >= len(source)]
    if outside:
        raise UserError(f"--indices: there is no image {outside[0]}; there are {len(source)}")
    images = {}
    with reading(source):
        start = 0
        for batch in _batches(arguments, loaded, source, dataset):
            images.update(
                {i: batch[i - start].numpy() for i in indices if 0 <= i - start < len(batch)}
            )
            start += len(batch)
            if len(images) == len(set(indices)):
                break
    return np.stack([images[index] for index in indices]), [names[index] for index in indices]

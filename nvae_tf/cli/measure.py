"""The modes of ``evaluate_keras.py`` that measure: likelihood, samples, FID.

Functions import what needs TensorFlow, which takes seconds: by then the flags are known to be right.
"""

import re
from pathlib import Path

from nvae_tf.cli.model import load, origin, statistics_at
from nvae_tf.io.errors import UserError
from nvae_tf.io.paths import is_regular, user_path

GRID_COLUMNS, GRID_IMAGES = 10, 100
FID_SAMPLES, FID_CHANNELS = 50_000, (1, 3)
SAMPLE = re.compile(r"\d{6,}\.(png|tif)")  # names of images that are written one by one


def evaluate(arguments) -> None:
    """Computes the NELBO and the importance-weighted log-likelihood."""
    loaded, (path,) = load(arguments, "evaluate.json")
    from nvae_tf.data import catalog, pipeline
    from nvae_tf.data.source import reading
    from nvae_tf.evaluation import likelihood
    from nvae_tf.evaluation.scores import likelihood_scores, reported_model
    from nvae_tf.io.files import write_json

    config, kinds = loaded.config, likelihood.kinds_of(loaded.model, arguments.likelihood)
    dataset = catalog.get_dataset_info(config.data)
    train, test = dataset.open(config.data.data)
    source = train if arguments.eval_on_train else test
    batches = pipeline.evaluation_batches(
        source,
        dataset,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        num_bits=loaded.model.num_bits,
    )
    with reading(source):
        results = likelihood.evaluate_kinds(
            loaded.model,
            batches,
            len(source),
            kinds,
            num_draws=arguments.num_iw_samples,
            chunk=arguments.iw_chunk,
            seed=arguments.seed,
        )
    summaries = {
        likelihood.name_of(loaded.model, kind): likelihood.summarize(
            result, loaded.model.bits_per_dim
        )
        for kind, result in results.items()
    }
    own, *others = summaries
    report = {
        **summaries[own],
        "likelihood": own,
        **{name: summaries[name] for name in others},
        "num_images": len(source),
        "num_iw_samples": arguments.num_iw_samples,
        "seed": arguments.seed,
        **reported_model(loaded),
        "split": "train" if arguments.eval_on_train else "test",
    }
    for kind, summary in summaries.items():
        print(f"likelihood: {kind}")
        for score in likelihood_scores(summary, arguments.num_iw_samples, "", kind):
            print(f"{score.name}: {score.text('+-')}")
    write_json(path, report)
    print(f"written: {path}")


def _readjust(arguments, model) -> None:
    """Readjusts batch norm if the flags ask for it."""
    from nvae_tf.evaluation.sampling import readjust_batch_norm

    if arguments.readjust_bn:
        readjust_batch_norm(model, statistics_at(arguments, model, arguments.temp))


def sample(arguments) -> None:
    """Writes a grid of samples, and on request every sample."""
    name = f"samples_{arguments.temp:g}" + ("_readjusted" if arguments.readjust_bn else "")
    endings = [".png", ".npz"] if arguments.format == "npz" else [".png"]
    loaded, written = load(arguments, *(name + ending for ending in endings))
    if arguments.format == "png":
        written.append(written[0].parent / name)
        _check_holds_samples(written[-1])
    import numpy as np

    from nvae_tf.evaluation import sampling, stored_images
    from nvae_tf.io.files import atomic_write, atomic_write_dir, write_png
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    _readjust(arguments, loaded.model)
    spec, num_samples = loaded.model.image, arguments.num_samples or GRID_IMAGES
    levels, rate = sampling.sample(
        loaded.model,
        num_samples,
        arguments.temp,
        batch_size=min(arguments.batch_size, num_samples),
        seed=arguments.seed,
    )
    pictures = stored_images.from_levels(levels[:GRID_IMAGES], spec)
    note = f"{origin(loaded)}; temperature {arguments.temp:g}"
    note += (", readjusted batch norm" if arguments.readjust_bn else "") + "; "
    picture = labelled_grid(
        [Band(pictures)],
        GRID_COLUMNS,
        "Samples",
        note + loaded.model.pixels_of_samples,
    )
    write_png(written[0], picture)
    if arguments.format == "npz":
        with atomic_write(written[-1]) as temporary, temporary.open("wb") as file:
            value_range = np.array(stored_images.value_range(spec))
            np.savez_compressed(file, images=levels, value_range=value_range)
    elif arguments.format == "png":
        with atomic_write_dir(written[-1]) as temporary:
            for index, image in enumerate(levels):
                path = temporary / f"{index:06d}{stored_images.ending(spec)}"
                stored_images.write_image(path, image, spec)
    print(f"speed: {rate:.1f} samples/s")
    print("written: " + ", ".join(map(str, written)))


def _check_holds_samples(folder: Path) -> None:
    """Refuses a folder that is to be replaced, and holds anything but images of this mode."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: not a folder; remove it, or choose another --output")
    for path in folder.iterdir() if folder.exists() else ():
        if not SAMPLE.fullmatch(path.name) or not is_regular(path):
            raise UserError(
                f"{folder}: would be replaced, and holds {path.name}, which is not a sample; "
                "move that, or choose another --output"
            )


def _check_fid_channels(image) -> None:
    if image.channels not in FID_CHANNELS:
        raise UserError(
            f"FID: is not defined for images of {image.channels} channels; Inception sees grey or "
            "colour images"
        )


def fid_stats(arguments) -> None:
    """Writes statistics of the Inception features of the data, reduced to 8 bits."""
    loaded, (path,) = load(arguments, "fid_stats.npz")
    _check_fid_channels(loaded.model.image)
    import numpy as np
    from tqdm import tqdm

    from nvae_tf.data import catalog, pipeline
    from nvae_tf.data.source import reading
    from nvae_tf.evaluation import fid, inception
    from nvae_tf.io.image_grid import to_bytes

    features = inception.load(arguments.inception)
    dataset = catalog.get_dataset_info(loaded.config.data)
    train, test = dataset.open(loaded.config.data.data)
    sources = (train, test) if dataset.fid_on_all else (train,)
    accumulator, (rows, columns) = fid.FeatureStatistics(), dataset.image.scored_part
    view = dict(batch_size=arguments.batch_size, seed=arguments.seed)
    with (
        reading(*sources),
        tqdm(total=sum(map(len, sources)), unit="image", desc="features", disable=None) as bar,
    ):
        for source in sources:
            for images in pipeline.evaluation_batches(source, dataset, **view):
                accumulator.add(features(to_bytes(np.asarray(images)[:, rows, columns])))
                bar.update(len(images))
    accumulator.statistics().save(path)
    print(f"statistics: {accumulator.count} images of {dataset.name}")
    print(f"written: {path}")


def evaluate_fid(arguments) -> None:
    """Computes FID, KID, precision and recall of samples."""
    if not arguments.fid_stats:
        raise UserError(
            "FID needs the data's statistics: make them with --eval_mode fid_stats, and give "
            "--fid_stats their file"
        )
    from nvae_tf.evaluation import fid, inception, sampling, stored_images
    from nvae_tf.evaluation.scores import reported_model
    from nvae_tf.io.files import write_json

    features = inception.load(arguments.inception)
    reference = fid.Statistics.load(user_path(arguments.fid_stats))
    loaded, (path,) = load(arguments, "fid.json")
    _check_fid_channels(loaded.model.image)
    _readjust(arguments, loaded.model)
    num_samples = arguments.num_samples or FID_SAMPLES
    image = loaded.model.image
    accumulator, (rows, columns) = fid.FeatureStatistics(), image.scored_part
    for levels in sampling.sample_batches(
        loaded.model,
        num_samples,
        arguments.temp,
        batch_size=min(arguments.batch_size, num_samples),
        seed=arguments.seed,
    ):
        accumulator.add(features(stored_images.levels_to_bytes(levels[:, rows, columns], image)))
    report = {
        **fid.compare(reference, accumulator.statistics()),
        "num_samples": num_samples,
        "temperature": arguments.temp,
        "readjust_bn": arguments.readjust_bn,
        "seed": arguments.seed,
        **reported_model(loaded),
    }
    print(f"FID: {report['fid']:.3f} of {num_samples} samples at temperature {arguments.temp:g}")
    if "kid" in report:
        print(
            f"KID: {report['kid']:.5f}, precision {report['precision']:.3f}, "
            f"recall {report['recall']:.3f}"
        )
    write_json(path, report)
    print(f"written: {path}")

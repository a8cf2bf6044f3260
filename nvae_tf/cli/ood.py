"""The mode ``ood`` of ``evaluate_keras.py``: outliers among images.

Functions import what needs TensorFlow, which takes seconds: by then the flags are known to be right.
"""

import csv
import io
import math

from nvae_tf.cli.model import load
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import write_json, write_png, write_text

SHOWN = 10  # images at each end of the picture's rows
MARKED_QUANTILE = 0.95  # of the test images' scores; images above it are marked as outliers
LISTED = 5  # images at each end that are printed


def ood(arguments) -> None:
    """Scores how much images differ from the training images, and compares two sets."""
    if arguments.against is not None and arguments.images:
        raise UserError(
            "--against and --images do not go together: --against compares the test set"
        )
    if arguments.against_data is not None and arguments.against is None:
        raise UserError("--against_data is the folder of a data set that --against names")
    loaded, paths = load(arguments, "ood.json", "ood.csv", "ood.png")
    from nvae_tf.evaluation import ood_run, typicality
    from nvae_tf.evaluation.ood import chosen_k
    from nvae_tf.evaluation.scores import reported_model

    settings = ood_run.Settings(
        num_draws=arguments.num_iw_samples,
        chunk=arguments.iw_chunk,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        max_images=arguments.max_images,
        fit_images=arguments.fit_images,
    )
    # All images are read before any is scored, so that mistakes show within seconds.
    comparing, train = arguments.against is not None, arguments.eval_on_train
    sets = [ood_run.split(loaded, train and comparing, settings)]
    if comparing:
        data = arguments.against_data or ""
        sets.append(ood_run.against(loaded, arguments.against, settings, data))
    elif arguments.images:
        sets.append(ood_run.files(loaded, arguments.images, settings))
    elif train:
        sets.append(ood_run.split(loaded, True, settings))
    # Training images that are compared are not among those that say what is typical.
    compared = map(int, sets[0].names) if comparing and train else ()
    fit = ood_run.fit(loaded, settings, without=list(compared))
    inside, *others = [ood_run.score(loaded, images, settings, fit) for images in sets]
    report = {
        **reported_model(loaded),
        "seed": arguments.seed,
        "num_iw_samples": arguments.num_iw_samples,
        "chosen": {"score": typicality.NAME, "rule": typicality.RULE},
        "fit": {"set": "train", "count": fit.num_images},
        "chosen_llr": {"score": f"llr_gt_{chosen_k(loaded.model)}", "rule": "all groups but one"},
        "images": [
            {"set": scored.set.title, "count": len(scored.set.names)}
            for scored in (inside, *others)
        ],
    }
    if comparing:
        report = {"scores": _separations(inside, others[0], arguments.seed), **report}
        shown = [inside, others[0]]
    else:
        shown = [others[0] if others else inside]
        report.update(_marked(inside, shown[0]))
    threshold = report.get("threshold", {}).get("value")
    write_text(paths[1], _table(shown, threshold))
    write_png(paths[2], _picture(shown))
    write_json(paths[0], report)
    print("written: " + ", ".join(map(str, paths)))


def _separations(inside, outside, seed: int) -> dict:
    """Metrics of every score, which are printed too."""
    from nvae_tf.evaluation import typicality
    from nvae_tf.evaluation.ood_metrics import METRICS, separation

    results = {}
    print(f"{'score':<14}" + "".join(f"{name:>24}" for name in METRICS))
    for name, values in inside.scores.items():
        results[name] = separation(values, outside.scores[name], seed)
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*results[name][metric]) for metric in METRICS]
        chosen = "  chosen" if name == typicality.NAME else ""
        print(f"{name:<14}" + "".join(f"{cell:>24}" for cell in cells) + chosen)
    return results


def _marked(inside, scored) -> dict:
    """The threshold from the test images, and how many images are above it; printed too."""
    import numpy as np

    from nvae_tf.evaluation import typicality

    values = scored.scores[typicality.NAME]
    threshold = float(np.quantile(inside.scores[typicality.NAME], MARKED_QUANTILE))
    marked = int(np.sum(values > threshold))
    order = np.argsort(-values, kind="stable")
    print(
        f"outliers: {marked} of {len(values)} images have {typicality.NAME} above {threshold:.2f}, "
        f"the {100 * MARKED_QUANTILE:.0f}th percentile of the {inside.set.title} images"
    )
    for title, indices in (("least", order[:LISTED]), ("most", order[::-1][:LISTED])):
        named = ", ".join(f"{scored.set.names[i]} ({values[i]:.1f})" for i in indices)
        print(f"{title} typical: {named}")
    return {
        "threshold": {"value": threshold, "quantile": MARKED_QUANTILE, "of": inside.set.title},
        "outliers": marked,
    }


def _table(sets, threshold: float | None) -> str:
    """A row for each image: its set, its name and every score.

    With a threshold, also its rank by typicality, 1 for the least typical, and whether it is above.
    """
    import numpy as np

    from nvae_tf.evaluation import typicality

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = list(sets[0].scores)
    marks = [] if threshold is None else ["rank", "outlier"]
    writer.writerow(["set", "image", *names, *marks])
    for scored in sets:
        values = scored.scores[typicality.NAME]
        ranks = np.argsort(np.argsort(-values, kind="stable")) + 1
        for index, image in enumerate(scored.set.names):
            cells = [f"{scored.scores[name][index]:.6g}" for name in names]
            if threshold is not None:
                cells += [str(ranks[index]), str(int(values[index] > threshold))]
            writer.writerow([scored.set.title, image, *cells])
    return file.getvalue()


def _picture(sets):
    """Two rows for each set: its most and its least typical images, with their scores."""
    from nvae_tf.evaluation.ood_run import extremes
    from nvae_tf.io.labelled_grid import Band, labelled_grid

    columns = min(SHOWN, *(len(scored.set.names) for scored in sets))
    bands = []
    for scored in sets:
        ends = extremes(scored, columns)
        title = scored.set.title.rstrip("/").rsplit("/", 1)[-1][:14]
        for end, images, values in (
            ("most", ends.typical, ends.typical_scores),
            ("least", ends.untypical, ends.untypical_scores),
        ):
            captions = [[_short(value)] for value in values]
            bands.append(Band(images, f"{title}:\n{end} typical", captions))
    return labelled_grid(bands, columns, "Typical and untypical images")


def _short(value: float) -> str:
    return f"{value:.1f}" if math.fabs(value) < 1e5 else f"{value:.0e}"

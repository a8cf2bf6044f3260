#!/usr/bin/env python3
"""Writes the tables of docs/latents.md from a run of the digits recipe.

python docs/make_latents_table.py runs/digits
"""

import argparse
from pathlib import Path

import numpy as np
from markdown_tables import markdown, write_tables

from nvae_tf.config import data_override
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import reading
from nvae_tf.evaluation import latents
from nvae_tf.evaluation.loading import load

PAGE = Path(__file__).parent / "latents.md"
SAMPLES, TEMPERATURE, SEED, BATCH = 100, 0.8, 1, 128
CLASSES = 10
GROUPS = ["group", "shape", "change of a pixel", "KL of the test set"]
POINTS = ["what", "k-means, normalised mutual information", "logistic regression, test accuracy"]


def tables(run: str) -> list[list[str]]:
    """The page's tables as lines of Markdown: what each group does, and what latents tell of digits.

    Args:
        run: Path of a run's folder, or anything else that `loading.load` takes.
    """
    loaded = load(run, data_override(None))
    model, dataset = loaded.model, catalog.get_dataset_info(loaded.config.data)
    train, test = (_encoded(loaded, dataset, source) for source in dataset.open(""))
    return [_groups_table(model, test), _points_table(model, train, test)]


def _encoded(loaded, dataset, source) -> dict:
    """KL, latents, pixels and label of each image of a data set, as arrays by name."""
    groups = list(range(len(loaded.model.groups)))
    options = dict(batch_size=BATCH, seed=SEED, num_bits=loaded.model.num_bits)
    with reading(source):
        batches = list(pipeline.evaluation_batches(source, dataset, **options))
        encoded = list(latents.encode_batches(loaded.model, batches, groups, SEED))
    return {
        "kl": np.concatenate([batch.kl for batch in encoded]),
        "means": [np.concatenate(parts) for parts in zip(*(b.mean for b in encoded), strict=True)],
        "binarised": np.concatenate(batches),
        "grey": source.images.numpy() / 255.0,
        "labels": source.labels.numpy(),
    }


def _groups_table(model, test) -> list[str]:
    change = latents.influence(model, SAMPLES, TEMPERATURE, SEED)
    kl = test["kl"].mean(0)
    rows = [
        [str(group), "x".join(map(str, shape)), f"{change[group]:.3f}", f"{kl[group]:.2f} nats"]
        for group, shape in enumerate(model.latent_shapes)
    ]
    return markdown([GROUPS, *rows, ["all", "", "", f"{kl.sum():.2f} nats"]])


def _points_table(model, train, test) -> list[str]:
    """How well k-means and a linear classifier find the digits, from latents and from pixels."""
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import normalized_mutual_info_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    shapes = model.latent_shapes
    coarse = [group for group, shape in enumerate(shapes) if shape == shapes[0]]
    fine = [group for group, shape in enumerate(shapes) if shape != shapes[0]]
    features = {
        "groups " + ", ".join(map(str, groups)): lambda split, g=groups: [
            split["means"][group] for group in g
        ]
        for groups in (coarse, fine)
        if groups
    }
    features["the binarised pixels that the model sees"] = lambda split: [split["binarised"]]
    features["the grey pixels behind them"] = lambda split: [split["grey"]]
    rows = []
    for name, select in features.items():
        train_points, test_points = (
            np.concatenate([array.reshape(len(array), -1) for array in select(split)], 1)
            for split in (train, test)
        )
        clusters = KMeans(CLASSES, n_init=10, random_state=0).fit_predict(train_points)
        score = normalized_mutual_info_score(train["labels"], clusters)
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        accuracy = classifier.fit(train_points, train["labels"]).score(test_points, test["labels"])
        rows.append([name, f"{score:.2f}", f"{accuracy:.3f}"])
    return markdown([POINTS, *rows])


def main():
    """Makes the tables of the run that the command line names, and writes them into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a run of the digits recipe")
    write_tables(PAGE, tables(parser.parse_args().run))


if __name__ == "__main__":
    main()

"""Tells digits 5 to 9 from digits 0 to 4, with a model that has seen the latter alone.

    python examples/other_classes.py runs/half

trains on half of the classes of scikit-learn's digits (minutes on two CPU cores) and prints how well
the scores of docs/outliers.md separate the other half from the test images of the first: the area under
the ROC curve, with its 95 % interval.
"""

import argparse

import numpy as np

import nvae_tf
from nvae_tf.config import DataConfig
from nvae_tf.data import catalog, pipeline
from nvae_tf.data.source import ArraySource
from nvae_tf.evaluation import ood_run
from nvae_tf.evaluation.loading import load
from nvae_tf.evaluation.ood import chosen_k
from nvae_tf.evaluation.ood_metrics import separation

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("out", help="folder of the run")
parser.add_argument("--epochs", type=int, default=10, help="of the training (default: 10)")
parser.add_argument("--count", type=int, default=150, help="images of each set (default: 150)")
parser.add_argument("--draws", type=int, default=10, help="draws of z per image (default: 10)")
options = parser.parse_args()

digits = catalog.get_dataset_info(DataConfig(dataset="digits"))
train, test = digits.open("")


def of_classes(source, classes):
    """The images of some classes, 8-bit, (n, 32, 32, 1)."""
    return source.images.numpy()[np.isin(source.labels.numpy(), classes)]


def seen(title, images):
    """Images as the model sees them: binarised by the seed and their content."""
    batches = pipeline.evaluation_batches(
        ArraySource(images[: options.count]), digits, batch_size=100, seed=1, by_content=True
    )
    pixels = np.concatenate([batch.numpy() for batch in batches])
    return ood_run.ImageSet(title, [str(index) for index in range(len(pixels))], pixels)


known, others = of_classes(test, range(5)), of_classes(test, range(5, 10))
nvae_tf.train(
    "digits",
    dataset=(of_classes(train, range(5)), known),
    image=digits.image,
    folder=options.out,
    epochs=options.epochs,
)
loaded, settings = load(options.out), ood_run.Settings(num_draws=options.draws)
fitted_to = seen("train, 0 to 4", of_classes(train, range(5)))
fit = ood_run.fit_to(loaded, fitted_to, settings)
inside = ood_run.score(loaded, seen("test, 0 to 4", known), settings, fit)
outside = ood_run.score(loaded, seen("test, 5 to 9", others), settings, fit)
print("| score | area |")
print("| --- | --- |")
for name in ("neg_log_p", "complexity", f"llr_gt_{chosen_k(loaded.model)}", "typicality"):
    area = separation(inside.scores[name], outside.scores[name], seed=1)["auroc"]
    print("| `{}` | {:.3f} ({:.3f} to {:.3f}) |".format(name, *area))

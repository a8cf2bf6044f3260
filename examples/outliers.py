"""Finds images that a trained model considers unlikely: outlier detection by likelihood.

    python examples/outliers.py runs/digits

scores the test images with the importance-weighted estimate of -log p(x), and the same images after
changes that take them out of the training distribution. The area under the ROC curve says how well a
threshold on the score separates the changed images from the others: 1 perfectly, 0.5 not at all.

Likelihood is not a safe detector: images simpler than the training data (smooth, dark, empty) can be
more likely than the data itself (Nalisnick et al., *Do Deep Generative Models Know What They Don't
Know?*, 2019). The last row shows it.
"""

import argparse

import numpy as np
from sklearn.metrics import roc_auc_score

from nvae_tf.data import catalog, pipeline
from nvae_tf.evaluation.likelihood import evaluate
from nvae_tf.evaluation.loading import load

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("run", help="the folder of a run, or an official .pt file")
parser.add_argument("--data", help="where the data set is (default: where training had it)")
parser.add_argument("--count", type=int, default=200, help="test images (default: 200)")
parser.add_argument("--draws", type=int, default=20, help="draws of z per image (default: 20)")
options = parser.parse_args()

loaded = load(options.run, {"data": options.data} if options.data else None)
model, config = loaded.model, loaded.config
dataset = catalog.get_dataset_info(config.data)
_, test = dataset.open(config.data.data)
batches = pipeline.evaluation_batches(
    test, dataset, batch_size=options.count, seed=1, num_bits=loaded.model.num_bits
)
images = next(iter(batches)).numpy()


def surprise(images):
    """-log p(x) of each image, in nats."""
    parts = [images[start : start + 50] for start in range(0, len(images), 50)]
    likelihoods = evaluate(model, parts, len(images), num_draws=options.draws, chunk=1, seed=1)
    return likelihoods.neg_log_likelihood


height, width = images.shape[1:3]
rng = np.random.default_rng(0)
shuffled = images.reshape(len(images), -1, images.shape[-1])
changed = {
    "upside down": images[:, ::-1],
    **({"turned by 90 degrees": np.rot90(images, axes=(1, 2))} if height == width else {}),
    "negative": 1.0 - images,
    "pixels shuffled": rng.permuted(shuffled, axis=1).reshape(images.shape),
    "empty": np.zeros_like(images),
}
scores = surprise(images)
threshold = np.quantile(scores, 0.95)
print(f"test images: {scores.mean():.1f} nats; 5 % are above {threshold:.1f}")
for name, others in changed.items():
    changed_scores = surprise(np.ascontiguousarray(others))
    labels = np.repeat([0, 1], [len(scores), len(changed_scores)])
    area = roc_auc_score(labels, np.concatenate([scores, changed_scores]))
    above = np.mean(changed_scores > threshold)
    print(
        f"{name}: {changed_scores.mean():.1f} nats; {above:.0%} above; "
        f"area under the ROC curve {area:.3f}"
    )

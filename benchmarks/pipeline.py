"""Images per second of the input pipeline, the training step and PyTorch's loader.

    python benchmarks/pipeline.py --config cifar10

Writes real photographs (crops of scikit-learn's two) in the recipe's format into a temporary folder,
and reads them back. The training step runs at `--step_batch` images with the recipe's model; if
memory is short, the flags of the recipe make the model smaller (and the step faster). Prints one
JSON line last. Only `torch_images_per_second` needs PyTorch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np

from nvae_tf.cli.flags import add_config_flags, configured
from nvae_tf.data import catalog, pipeline, tfrecords
from nvae_tf.data.source import ArraySource
from nvae_tf.model import NVAE
from nvae_tf.training.optimizers import Adamax
from nvae_tf.training.trainer import Trainer

import tensorflow as tf  # isort: skip

SECONDS = 8.0  # of each measurement

# A plain loader over the same images: a map-style data set, as torchvision's are, and its flips.
TORCH = """
    import sys, time, numpy as np, torch
    path, size, batch, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

    class Photographs(torch.utils.data.Dataset):
        def __init__(self):
            self.images = np.load(path, mmap_mode="r")

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            image = np.array(self.images[index])
            if torch.rand(()) < 0.5:
                image = np.ascontiguousarray(image[:, ::-1])
            return torch.from_numpy(image).permute(2, 0, 1).float().div_(255.0)

    loader = torch.utils.data.DataLoader(
        Photographs(), batch, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)
    for x in loader:
        break
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for x in loader:
            count += len(x)
            if time.perf_counter() - start > seconds:
                break
    print(count / (time.perf_counter() - start))
"""


def photographs(count: int, size: int) -> np.ndarray:
    """Crops of scikit-learn's two photographs at random places."""
    from sklearn.datasets import load_sample_images

    sources, rng = load_sample_images().images, np.random.RandomState(0)
    crops = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        image = sources[i % 2]
        top, left = (rng.randint(side - size + 1) for side in image.shape[:2])
        crops[i] = image[top : top + size, left : left + size]
    return crops


def write_tfrecords(folder: Path, images: np.ndarray, shards: int = 4) -> None:
    """Writes images in GLOW's layout."""
    (folder / "train").mkdir(parents=True)
    for index, part in enumerate(np.array_split(np.arange(len(images)), shards)):
        name = tfrecords.shard_name("train", images.shape[1:3], index, shards)
        with tf.io.TFRecordWriter(str(folder / "train" / name)) as writer:
            for i in part:
                writer.write(tfrecords.serialize(images[i]))


def pipeline_rate(source, dataset, config) -> float:
    """Images per second of the training pipeline."""
    batches = iter(
        pipeline.training_batches(
            source,
            dataset,
            batch_size=config.data.batch_size,
            seed=1,
            num_bits=config.model.x_bits(dataset.image),
        )
    )
    for _ in range(3):
        next(batches)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        count += len(next(batches))
    return count / (time.perf_counter() - start)


def step_rate(config, image, batch_size: int) -> float:
    """Images per second of the training step."""
    model = NVAE(config.model, image)
    trainer = Trainer(model, config.train, total_steps=1000, optimizer=Adamax(1e-3))
    step = tf.function(trainer.one_pass_step, autograph=False)
    images = tf.random.uniform((batch_size, *image.shape))
    step(images)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step(images)["loss"].numpy()
        times.append(time.perf_counter() - start)
    return batch_size / min(times)


def torch_rate(images: np.ndarray, folder: Path, batch_size: int) -> float | None:
    """Images per second of PyTorch's DataLoader, or None without PyTorch."""
    path = folder / "images.npy"
    np.save(path, images)
    script = [sys.executable, "-c", textwrap.dedent(TORCH)]
    arguments = [str(path), str(images.shape[1]), str(batch_size), str(SECONDS)]
    result = subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)
    return float(result.stdout) if result.returncode == 0 else None


def main() -> None:
    """Measures all three, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_flags(parser)
    parser.add_argument("--count", type=int, default=2000, help="images (default: 2000)")
    parser.add_argument(
        "--step_batch", type=int, default=2, help="images per step; 0: not measured (default: 2)"
    )
    arguments = parser.parse_args()
    config = configured(arguments).config
    dataset = catalog.get_dataset_info(config.data)
    images = photographs(arguments.count, dataset.image.height)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if config.data.dataset == "cifar10":
            source = ArraySource(images)
        else:
            write_tfrecords(folder, images)
            source = tfrecords.TFRecordSource(folder, "train", dataset.image)
        ours = pipeline_rate(source, dataset, config)
        theirs = torch_rate(images, folder, config.data.batch_size)
    step = step_rate(config, dataset.image, arguments.step_batch) if arguments.step_batch else None
    report = {
        "config": arguments.config,
        "pipeline_images_per_second": round(ours, 1),
        "step_images_per_second": step and round(step, 2),
        "pipeline_per_step": step and round(ours / step, 1),
        "torch_images_per_second": theirs and round(theirs, 1),
        "pipeline_per_torch": theirs and round(ours / theirs, 2),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

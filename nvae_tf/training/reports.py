"""What is reported of a training: a bar and lines, TensorBoard's curves, and pictures."""

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.config import Config
from nvae_tf.files import write_png
from nvae_tf.pictures import grid
from nvae_tf.run_folder import RunFolder

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
COLUMNS, SAMPLE_ROWS = 10, 2  # rows at each temperature


class Progress:
    """A bar over the steps of an epoch, on terminals only, and a line at its end.

    Args:
        epochs: of the whole training.
        steps_per_epoch: steps.
    """

    def __init__(self, epochs: int, steps_per_epoch: int):
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self._bar: tqdm | None = None

    def step(self, step: int, logs) -> None:
        """Moves the bar.

        Args:
            step: steps taken.
            logs: of the last one.
        """
        epoch, done = divmod(step - 1, self.steps_per_epoch)
        if self._bar is None:
            self._bar = tqdm(
                total=self.steps_per_epoch,
                initial=done,
                desc=f"epoch {epoch + 1}/{self.epochs}",
                unit="step",
                leave=False,
                disable=None,
                dynamic_ncols=True,
            )
        if self._bar.update():
            self._bar.set_postfix_str(_line(logs), refresh=False)

    def epoch(self, epoch: int, logs, validation) -> None:
        """Prints the epoch's line; `validation` may be None."""
        self.close()
        line = f"epoch {epoch}/{self.epochs}: {_line(logs)}"
        if validation:
            line += f"; validation nelbo {float(validation['nelbo']):.2f}"
            line += f" bpd {float(validation['bpd']):.4f}"
        skipped = int(logs["skipped_steps"])
        print(line + (f"; {skipped} steps skipped so far" if skipped else ""), flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Curves:
    """Scalars of training and validation, and the configuration as text, for TensorBoard.

    Args:
        folder: of the run.
        config: of the run.
    """

    def __init__(self, folder: RunFolder, config: Config):
        self.train = tf.summary.create_file_writer(str(folder.logs / "train"))
        self.validation = tf.summary.create_file_writer(str(folder.logs / "validation"))
        with self.train.as_default(step=0):
            tf.summary.text("configuration", f"```yaml\n{config.to_yaml()}```")

    def step(self, step: int, logs) -> None:
        """Writes a training step's scalars."""
        with self.train.as_default(step=step):
            _write_scalars(logs)

    def epoch(self, step: int, validation) -> None:
        """Writes a validation's scalars, if there was one."""
        if validation:
            with self.validation.as_default(step=step):
                _write_scalars(validation)
        self.train.flush()
        self.validation.flush()


class Pictures:
    """Grids of samples and reconstructions, as PNG files and in TensorBoard.

    ``samples.png`` holds two rows at each of the temperatures 0.7, 0.8, 0.9 and 1.0, from the top.
    ``reconstructions.png`` holds images of the test set in odd rows, and below each what became of
    it. The noise is the same every time, so that pictures of different epochs compare.

    Args:
        folder: of the run.
        writer: of TensorBoard's files.
        model: the model.
        images: (at least 20, height, width, channels) test images in [0, 1].
        seed: of the noise.
    """

    def __init__(self, folder: RunFolder, writer, model, images, seed: int):
        self.folder, self.writer, self.seed = folder, writer, (seed, 0)
        self.images = tf.convert_to_tensor(images)[: 2 * COLUMNS]
        num_samples = COLUMNS * SAMPLE_ROWS

        def sample(temperature):
            return model.sample(num_samples, temperature, seed=self.seed)

        def reconstruct(images):
            noise = model.draw_noise(len(self.images), self.seed)
            return model.reconstruct(images, noise, self.seed)

        self.sample = tf.function(sample, autograph=False)
        self.reconstruct = tf.function(reconstruct, autograph=False)

    def draw(self, step: int) -> None:
        """Draws and writes both grids."""
        samples = {t: self.sample(tf.constant(t)).numpy() for t in TEMPERATURES}
        reconstructed = self.reconstruct(self.images).numpy()
        rows = [
            images[start : start + COLUMNS]
            for start in range(0, len(self.images), COLUMNS)
            for images in (self.images.numpy(), reconstructed)
        ]
        reconstructions = grid(np.concatenate(rows), COLUMNS)
        write_png(self.folder.samples, grid(np.concatenate(list(samples.values())), COLUMNS))
        write_png(self.folder.reconstructions, reconstructions)
        with self.writer.as_default(step=step):
            tf.summary.image("reconstructions", reconstructions[None])
            for temperature, images in samples.items():
                tf.summary.image(f"samples/temperature_{temperature}", grid(images, COLUMNS)[None])
        self.writer.flush()


class Reports:
    """All of it together, for the process that writes.

    Args:
        folder: of the run.
        config: of the run.
        steps_per_epoch: steps.
        model: the model.
        test_images: for reconstructions.
    """

    def __init__(self, folder: RunFolder, config: Config, steps_per_epoch: int, model, test_images):
        self._every = config.train.log_every
        self._progress = Progress(config.train.epochs, steps_per_epoch)
        self._curves = Curves(folder, config)
        writer, seed = self._curves.train, config.data.seed
        self._pictures = Pictures(folder, writer, model, test_images, seed)

    def step(self, step: int, logs) -> None:
        """Reports a training step."""
        self._progress.step(step, logs)
        if step % self._every == 0 or step == 1:
            self._curves.step(step, logs)

    def epoch(self, epoch: int, step: int, logs, validation) -> None:
        """Reports an epoch; `validation` may be None."""
        self._progress.epoch(epoch, logs, validation)
        self._curves.epoch(step, validation)

    def pictures(self, step: int) -> None:
        """Draws pictures."""
        self._pictures.draw(step)

    def close(self) -> None:
        """Removes the bar."""
        self._progress.close()


def divergence(trainer, step: int, latest) -> str:
    """What went wrong, for the user, when too many steps in a row were skipped."""
    terms = ["the reconstruction", "the spectral norms", "the batch norms", "the gradient"]
    bad = trainer.first_bad.numpy()
    groups = np.flatnonzero(bad[len(terms) :])
    found = [name for name, is_bad in zip(terms, bad, strict=False) if is_bad]
    if len(groups):
        found.insert(0, f"the KL of groups {', '.join(map(str, groups))} (0 the coarsest)")
    first = (
        f"first not finite: {', '.join(found)}" if found else "gradients over skip_gradient_norm"
    )
    row = int(trainer.bad_in_row.numpy())
    return (
        f"{row} steps in a row, up to step {step}, were skipped; {first}; the last good checkpoint, "
        f"{latest or 'none yet'}, is intact; the paper's remedies: a larger weight_decay_norm, "
        "annealing it (weight_decay_norm_anneal), a lower learning_rate"
    )


def _line(logs):
    values = {name: float(logs[name]) for name in ("nelbo", "recon", "kl", "learning_rate")}
    values["lr"] = values.pop("learning_rate")
    return " ".join(
        f"{name} {value:.2e}" if name == "lr" else f"{name} {value:.2f}"
        for name, value in values.items()
    )


def _write_scalars(logs):
    for name, value in logs.items():
        values = np.asarray(value)
        if values.ndim == 0:
            tf.summary.scalar(name, values)
        else:
            for group, entry in enumerate(values):
                tf.summary.scalar(f"{name}/{group:02d}", entry)

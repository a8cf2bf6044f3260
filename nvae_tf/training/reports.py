"""Reports on a training: a progress bar and lines, curves, and pictures."""

import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from nvae_tf.config import Config
from nvae_tf.io.files import write_png
from nvae_tf.io.labelled_grid import Band, labelled_grid, reconstruction_bands
from nvae_tf.io.text import duration
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.curves import CurveWriter, interval, writing
from nvae_tf.training.trainer import Trainer

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
COLUMNS, SAMPLE_ROWS = 10, 2  # SAMPLE_ROWS per temperature
PICTURED = 2 * COLUMNS  # number of test images that are reconstructed


class Progress:
    """A progress bar over the steps of an epoch, on terminals only, and a line at the epoch's end.

    Both give the number of images trained on per second. The line also estimates how long the rest of
    the run will take, validations and pictures included.

    Args:
        epochs: Number of epochs of the whole training.
        steps_per_epoch: Number of steps in an epoch.
        images_per_step: Number of images in a step, over all replicas.
        end: Step after which this process ends.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, images_per_step: int, end: int):
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.images_per_step, self.end = images_per_step, end
        self._bar: tqdm | None = None
        self._created = time.monotonic()
        # The first step of this process and of this epoch, each with the time at which it was done.
        self._first: tuple[int, float] | None = None
        self._epoch_began: tuple[int, float] | None = None
        self._speed_of_epoch = ""

    def step(self, step: int, logs) -> None:
        """Moves the bar.

        Args:
            step: Number of steps taken so far.
            logs: What the last step reports.
        """
        epoch, done = divmod(step - 1, self.steps_per_epoch)
        if self._first is None:
            float(logs["loss"])  # waits for the device
            self._first = (step, time.monotonic())
            print(f"first step: took {duration(self._first[1] - self._created)}", flush=True)
        if self._epoch_began is None:
            self._epoch_began = (step, time.monotonic())
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
        if self._bar.update(done + 1 - self._bar.n):
            self._bar.set_postfix_str(_losses_text(logs) + self._speed(step), refresh=False)

    def _speed(self, step: int) -> str:
        """Images per second in this epoch, as part of a line; empty before its second step."""
        first, since = self._epoch_began or (step, 0.0)
        if step == first:
            return ""
        rate = (step - first) * self.images_per_step / (time.monotonic() - since)
        return f"; {rate:.3g} images/s" if rate < 1000 else f"; {rate:,.0f} images/s"

    def _time_left(self, step: int) -> str:
        """An estimate of how long the rest of the run will take, as part of a line."""
        first, since = self._first or (step, 0.0)
        if step in (first, self.end):
            return ""
        seconds = (time.monotonic() - since) / (step - first) * (self.end - step)
        return f"; {duration(seconds)} left"

    def trained(self, step: int) -> None:
        """Records the speed of an epoch's steps, before its validation begins."""
        self.close()
        self._speed_of_epoch, self._epoch_began = self._speed(step), None

    def epoch(self, epoch: int, step: int, logs, validation) -> None:
        """Prints the epoch's line; `validation` may be None."""
        line = f"epoch {epoch}/{self.epochs}: {_losses_text(logs)}"
        if validation:
            line += f"; validation nelbo {float(validation['nelbo']):.2f}"
            line += f" bpd {float(validation['bpd']):.4f}"
        line += self._speed_of_epoch + self._time_left(step)
        skipped = int(logs["skipped_steps"])
        print(line + (f"; {skipped} steps skipped so far" if skipped else ""), flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class PictureWriter:
    """Grids of samples and reconstructions, as PNG files and in TensorBoard.

    ``samples.png`` holds two rows at each of the temperatures 0.7, 0.8, 0.9 and 1.0.
    ``reconstructions.png`` holds images of the test set, and below each its reconstruction: the mean
    of p(x | z) with one draw of z. The noise is the same every time, so that pictures of different
    epochs can be compared. Moving averages of the weights are used if there are any.

    Args:
        folder: Folder of the run.
        writer: Writer of TensorBoard's files.
        trainer: The trainer, which holds the model.
        images: Test images (n, height, width, channels) in [0, 1]; two rows of ten are shown, or one
            row if there are fewer than 20.
        seed: Seed of the noise.
    """

    def __init__(self, folder: RunFolder, writer, trainer: Trainer, images, seed: int):
        self.folder, self.writer, self.trainer, self.seed = folder, writer, trainer, (seed, 0)
        model = trainer.model
        self.columns = min(COLUMNS, len(images))
        rows = max(min(PICTURED, len(images)) // COLUMNS, 1)
        self.images = tf.convert_to_tensor(images)[: rows * self.columns]
        num_samples = COLUMNS * SAMPLE_ROWS

        def sample(temperature):
            return model.sample(num_samples, temperature, seed=self.seed)

        def reconstruct(images):
            noise = model.draw_noise(len(self.images), self.seed)
            return model.reconstruct(images, noise)

        self.sample = tf.function(sample, autograph=False)
        self.reconstruct = tf.function(reconstruct, autograph=False)

    def draw(self, step: int) -> None:
        """Draws and writes both grids."""
        with self.trainer.averaged_weights():
            samples = {t: self.sample(tf.constant(t)).numpy() for t in TEMPERATURES}
            reconstructed = self.reconstruct(self.images).numpy()
        reconstructions = labelled_grid(
            reconstruction_bands(self.images.numpy(), reconstructed, self.columns),
            self.columns,
            "Test images and their reconstructions",
            f"step {step:,}; means of p(x | z), one draw of z each",
        )
        bands = [Band(images, f"temperature\n{t:.1f}") for t, images in samples.items()]
        note = f"step {step:,}; {self.trainer.model.pixels_of_samples}"
        write_png(self.folder.samples, labelled_grid(bands, COLUMNS, "Samples", note))
        write_png(self.folder.reconstructions, reconstructions)
        with writing(self.folder, self.writer, step):
            tf.summary.image("reconstructions", reconstructions[None])
            for temperature, images in samples.items():
                picture = labelled_grid([Band(images)], COLUMNS)
                tf.summary.image(f"samples/temperature_{temperature}", picture[None])
            self.writer.flush()


class Reports:
    """The progress bar, curves and pictures of a run, for the process that writes.

    Args:
        folder: Folder of the run.
        config: Configuration of the run.
        progress: The progress bar and lines.
        trainer: The trainer.
        test_images: Images to reconstruct, (n, height, width, channels) in [0, 1].
        hparams: As for `CurveWriter`.

    Attributes:
        progress: The progress bar and lines.
        curves: The curves.
        pictures: The pictures.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        progress: Progress,
        trainer: Trainer,
        test_images,
        hparams: dict | None = None,
    ):
        self.progress, self._graph_shown = progress, False
        self._every = interval(config.train.log_every, progress.steps_per_epoch)
        self.curves = CurveWriter(folder, config, progress.images_per_step, hparams)
        writer, seed = self.curves.train, config.data.seed
        self.pictures = PictureWriter(folder, writer, trainer, test_images, seed)

    def steps(self, step: int, count: int, report_of: Callable) -> None:
        """Reports training steps.

        Args:
            step: Number of steps taken so far.
            count: Number of latest steps to report.
            report_of: As for `CurveWriter.steps`.
        """
        self.progress.step(step, report_of(-1))
        self.curves.steps(step, count, report_of, self._every)

    def epoch(self, epoch: int, step: int, logs, validation, graph: Callable) -> None:
        """Reports an epoch.

        Args:
            epoch: Number of epochs so far.
            step: Number of steps so far.
            logs: Report of the last step.
            validation: Result of the validation, or None.
            graph: Function that returns the graph of a step, which is written once.
        """
        if not self._graph_shown:
            self.curves.graph(graph())
            self._graph_shown = True
        self.progress.epoch(epoch, step, logs, validation)
        self.curves.epoch(step, validation)


def divergence(trainer: Trainer, step: int, checkpoint: str) -> str:
    """A message for the user about a divergence: what was not finite first, and what to do.

    Args:
        trainer: The trainer.
        step: Number of steps taken so far.
        checkpoint: Part of the sentence that says from which checkpoint training can continue.
    """
    terms = ["the reconstruction", "the spectral norms", "the batch norms", "the gradient"]
    bad = trainer.first_skip_causes.numpy()
    groups = np.flatnonzero(bad[len(terms) :])
    causes = [name for name, is_bad in zip(terms, bad, strict=False) if is_bad]
    if len(groups):
        causes.insert(0, f"the KL of groups {', '.join(map(str, groups))} (0 the coarsest)")
    first = (
        f"first not finite: {', '.join(causes)}" if causes else "gradients over skip_gradient_norm"
    )
    count = int(trainer.consecutive_skips.numpy())
    return (
        f"{count} steps in a row, up to step {step}, were skipped; {first}; "
        f"{checkpoint}; the paper's remedies: a larger weight_decay_norm, annealing it "
        "(weight_decay_norm_anneal), a lower learning_rate"
    )


def _losses_text(logs):
    values = {name: float(logs[name]) for name in ("nelbo", "recon", "kl", "learning_rate")}
    values["lr"] = values.pop("learning_rate")
    return " ".join(
        f"{name} {value:.2e}" if name == "lr" else f"{name} {value:.2f}"
        for name, value in values.items()
    )

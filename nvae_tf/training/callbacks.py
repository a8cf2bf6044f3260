"""What happens around the steps of training: progress, TensorBoard, pictures, checkpoints."""

import math

import numpy as np
import tensorflow as tf
import tf_keras
from tqdm import tqdm

from nvae_tf.config import Config
from nvae_tf.errors import UserError
from nvae_tf.files import write_png
from nvae_tf.pictures import grid
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.checkpoints import Checkpoints

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
COLUMNS, SAMPLE_ROWS = 10, 2  # rows at each temperature


class _Callback(tf_keras.callbacks.Callback):
    # Keras then hands over tensors instead of waiting for their values after every step.
    _supports_tf_logs = True


class Progress(_Callback):
    """A bar over the steps of an epoch and a line at its end.

    Args:
        epochs: of the whole training.
        steps_per_epoch: steps.
    """

    def __init__(self, epochs, steps_per_epoch):
        super().__init__()
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch

    def on_epoch_begin(self, epoch, logs=None):
        """Starts a bar; it shows on terminals only."""
        self.bar = tqdm(
            total=self.steps_per_epoch,
            desc=f"epoch {epoch + 1}/{self.epochs}",
            unit="step",
            leave=False,
            disable=None,
            dynamic_ncols=True,
        )

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar."""
        if self.bar.update():
            self.bar.set_postfix_str(_line(logs), refresh=False)

    def on_epoch_end(self, epoch, logs=None):
        """Prints the epoch's line."""
        self.bar.close()
        line = f"epoch {epoch + 1}/{self.epochs}: {_line(logs)}"
        if "val_nelbo" in logs:
            line += f"; validation nelbo {float(logs['val_nelbo']):.2f}"
            line += f" bpd {float(logs['val_bpd']):.4f}"
        print(line, flush=True)


class StopOnNaN(_Callback):
    """Ends training when the loss is no longer a number.

    Args:
        checkpoints: of the run.
        check_every: steps between checks, each of which waits for the step to finish.
    """

    def __init__(self, checkpoints: Checkpoints, check_every: int):
        super().__init__()
        self.checkpoints, self.check_every = checkpoints, check_every

    def on_train_batch_end(self, batch, logs=None):
        """Checks the step's loss now and then."""
        if batch % self.check_every == 0:
            self._check(logs)

    def on_epoch_end(self, epoch, logs=None):
        """Checks before the epoch's checkpoint is written."""
        self._check(logs)

    def _check(self, logs):
        if not math.isfinite(float(logs["loss"])):
            raise UserError(
                f"the loss is {float(logs['loss'])} after step {int(self.model.optimizer.iterations)}; "
                f"the last checkpoint, {self.checkpoints.latest or 'none yet'}, is intact; try a lower "
                "learning_rate, a larger weight_decay_norm, or weight_decay_norm_anneal"
            )


class SaveCheckpoint(_Callback):
    """Writes a checkpoint at the end of every epoch."""

    def __init__(self, checkpoints: Checkpoints):
        super().__init__()
        self.checkpoints = checkpoints

    def on_epoch_end(self, epoch, logs=None):
        """Writes it."""
        self.checkpoints.save()


class TensorBoard(_Callback):
    """Scalars of training and validation, and the configuration as text.

    Args:
        folder: of the run.
        config: of the run.
    """

    def __init__(self, folder: RunFolder, config: Config):
        super().__init__()
        self.every = config.train.log_every
        self.train = tf.summary.create_file_writer(str(folder.logs / "train"))
        self.validation = tf.summary.create_file_writer(str(folder.logs / "validation"))
        with self.train.as_default(step=0):
            tf.summary.text("configuration", f"```yaml\n{config.to_yaml()}```")

    def on_train_batch_end(self, batch, logs=None):
        """Writes the step's scalars now and then."""
        step = int(self.model.optimizer.iterations) if batch % self.every == 0 else 0
        if step:
            with self.train.as_default(step=step):
                _write_scalars(logs)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the validation's scalars."""
        prefix = "val_"
        validation = {k.removeprefix(prefix): v for k, v in logs.items() if k.startswith(prefix)}
        with self.validation.as_default(step=int(self.model.optimizer.iterations)):
            _write_scalars(validation)
        self.train.flush()
        self.validation.flush()


class Pictures(_Callback):
    """Grids of samples and reconstructions, as PNG files and in TensorBoard.

    ``samples.png`` holds two rows at each of the temperatures 0.7, 0.8, 0.9 and 1.0, from the top.
    ``reconstructions.png`` holds images of the test set in odd rows, and below each what became of
    it. The noise is the same every time, so that pictures of different epochs compare.

    Args:
        folder: of the run.
        config: of the run.
        images: (at least 20, height, width, channels) test images in [0, 1].
    """

    def __init__(self, folder: RunFolder, config: Config, images):
        super().__init__()
        self.folder, self.every, self.epochs = (
            folder,
            config.train.images_every,
            config.train.epochs,
        )
        self.images = tf.convert_to_tensor(images)[: 2 * COLUMNS]
        self.writer = tf.summary.create_file_writer(str(folder.logs / "train"))
        self.seed = (config.data.seed, 0)

    def set_model(self, model):
        """Makes one graph for samples and one for reconstructions."""
        super().set_model(model)
        nvae = model.model
        num_samples = COLUMNS * SAMPLE_ROWS

        def sample(temperature):
            return nvae.sample(nvae.draw_noise(num_samples, self.seed), temperature, self.seed)

        def reconstruct(images):
            output = nvae(images, nvae.draw_noise(len(self.images), self.seed))
            return nvae.render(output.parameters, self.seed)

        self.sample = tf.function(sample, autograph=False)
        self.reconstruct = tf.function(reconstruct, autograph=False)

    def on_epoch_end(self, epoch, logs=None):
        """Draws and writes both grids."""
        if (epoch + 1) % self.every and epoch + 1 != self.epochs:
            return
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
        with self.writer.as_default(step=int(self.model.optimizer.iterations)):
            tf.summary.image("reconstructions", reconstructions[None])
            for temperature, images in samples.items():
                tf.summary.image(f"samples/temperature_{temperature}", grid(images, COLUMNS)[None])
        self.writer.flush()


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

"""What TensorBoard shows of a training: scalars in groups, the configuration, and a step's graph."""

import contextlib
import resource
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorboard.plugins.hparams import api as hparams_plugin

from nvae_tf.config import Config
from nvae_tf.io.files import write_error
from nvae_tf.run_folder import SESSION, RunFolder

MEAN = "in training the mean over the epoch so far"

# Name in the report of a step or validation -> tag and description. Vectors have one tag per group.
TAGS = {
    "nelbo": ("elbo/nelbo", f"Negative ELBO in nats per image; {MEAN}"),
    "bpd": ("elbo/bpd", f"Negative ELBO in bits per dimension; {MEAN}"),
    "recon": ("elbo/recon", f"-log p(x | z) in nats per image; {MEAN}"),
    "kl": ("elbo/kl", f"KL of all groups in nats per image; {MEAN}"),
    "loss": ("elbo/loss", "What this step minimised, in nats per image, regularisation included"),
    "beta": ("elbo/beta", "KL coefficient"),
    "active_latents": ("elbo/active_latents", "Latent channels with a mean KL above 0.1 nats"),
    "kl_per_group": ("kl_per_group", "KL of this group in nats per image; group 0 is the coarsest"),
    "active_latents_per_group": (
        "active_latents_per_group",
        "Latent channels of this group with a mean KL above 0.1 nats",
    ),
    "gamma_per_group": ("gamma_per_group", "Balancing coefficient of this group's KL"),
    "learning_rate": ("optimizer/learning_rate", "Learning rate of this step"),
    "gradient_norm": (
        "optimizer/gradient_norm",
        "Norm of the gradient over all weights, in nats per image and unit of weight",
    ),
    "skipped_steps": ("optimizer/skipped_steps", "Steps so far that were not finite or too large"),
    "loss_scale": ("optimizer/loss_scale", "Factor on the loss, for float16"),
    "lambda": ("optimizer/lambda", "Coefficient of the spectral and batch-norm regularisation"),
    "spectral_loss": ("optimizer/spectral_loss", "Sum of the kernels' spectral norms"),
    "batch_norm_loss": ("optimizer/batch_norm_loss", "Sum of the batch norms' largest scales"),
    "images_per_second": ("speed/images_per_second", "Images over all replicas"),
    "step_milliseconds": ("speed/step_milliseconds", "Time of a step, data and reports included"),
    "memory_gigabytes": (
        "speed/memory_gigabytes",
        "Most memory of this process so far, in 10^9 bytes",
    ),
    "gpu_memory_gigabytes": ("speed/gpu_memory_gigabytes", "Most memory of the first GPU so far"),
}
POINTS_PER_EPOCH = 10  # at least
LARGEST_GRAPH = 20_000  # nodes; TensorBoard takes too long to draw larger graphs


def interval(log_every: int, steps_per_epoch: int) -> int:
    """Steps between training scalars: `log_every`, or fewer so that an epoch has at least ten."""
    return min(log_every, max(steps_per_epoch // POINTS_PER_EPOCH, 1))


class CurveWriter:
    """Scalars of training and validation, configuration and graph, for TensorBoard.

    Args:
        folder: Folder of the run.
        config: Configuration of the run.
        images_per_step: Images in a step, over all replicas; None if that is not known.
        hparams: Values for TensorBoard's tab HParams; default: the whole configuration.

    Raises:
        UserError: The files cannot be written.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        images_per_step: int | None,
        hparams: dict | None = None,
    ):
        self.train, self.validation = (
            make_writer(folder, "train"),
            make_writer(folder, "validation"),
        )
        self._folder, self._images_per_step = folder, images_per_step
        self._since: tuple[int, float] | None = None  # the step of the last scalars, and its time
        with writing(folder, self.train, 0):
            tf.summary.text("configuration", f"```yaml\n{config.to_yaml()}```")
        # Beside the validation's scalars, which are the tab's metrics.
        with writing(folder, self.validation, 0):
            values = config.to_dict() if hparams is None else hparams
            hparams_plugin.hparams(values, trial_id=folder.path.name)

    def steps(self, step: int, count: int, report_of: Callable, every: int) -> None:
        """Writes the scalars of the training steps that are due, and with the last of them the speed.

        Args:
            step: Number of steps taken so far.
            count: Number of latest steps that were taken since the last call.
            report_of: Returns the report of one of these steps, given its index; -1 is the last.
            every: Interval between steps that are due; the first step of a training is due, too.
        """
        latest = range(step - count + 1, step + 1)
        due = [number for number in latest if number % every == 0 or number == 1]
        for number in due:
            speed = self._speed(step) if number == due[-1] else {}
            values = {**_arrays(report_of(number - step - 1)), **speed}
            with writing(self._folder, self.train, number):
                write_scalars(values)

    def session(self, step: int, text: str) -> None:
        """Writes how this process was started.

        Args:
            step: The step from which it trains.
            text: Version, command and devices.
        """
        with writing(self._folder, self.train, step):
            tf.summary.text(SESSION, text)

    def graph(self, graph) -> None:
        """Writes the graph of a step, unless it is too large to be looked at.

        Args:
            graph: A `tf.Graph`.
        """
        if len(graph.get_operations()) > LARGEST_GRAPH:
            return
        definition = graph.as_graph_def()
        functions = definition.library.function
        if len(definition.node) + sum(len(f.node_def) for f in functions) <= LARGEST_GRAPH:
            with writing(self._folder, self.train, 0):
                tf.summary.graph(definition)

    def epoch(self, step: int, validation) -> None:
        """Writes a validation's scalars, if there was one."""
        if validation:
            values = _arrays(validation)
            with writing(self._folder, self.validation, step):
                write_scalars(values)
                self.validation.flush()
        self._since = None  # so that validation and pictures do not count as slow steps
        with writing(self._folder, self.train, step):
            self.train.flush()

    def _speed(self, step: int) -> dict[str, float]:
        now, before, self._since = time.monotonic(), self._since, (step, time.monotonic())
        values = {"memory_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024e-9}
        if tf.config.get_visible_devices("GPU"):
            peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
            values["gpu_memory_gigabytes"] = peak * 1e-9
        if before and now > before[1]:
            steps, seconds = step - before[0], now - before[1]
            if self._images_per_step:
                values["images_per_second"] = steps * self._images_per_step / seconds
            values["step_milliseconds"] = 1000.0 * seconds / steps
        return values


def make_writer(folder: RunFolder, name: str):
    """A writer of TensorBoard's files.

    Args:
        folder: Folder of the run.
        name: Name of the files' folder in its logs.

    Raises:
        UserError: The folder cannot be made.
    """
    try:
        return tf.summary.create_file_writer(str(folder.logs / name))
    except tf.errors.OpError as error:
        raise write_error(folder.logs, error) from None


@contextlib.contextmanager
def writing(folder: RunFolder, writer, step: int):
    """Makes a writer of TensorBoard's files the default in a block.

    The block should only write, since any TensorFlow error in it is taken for an error of writing.

    Args:
        folder: Folder of the run.
        writer: The writer.
        step: Steps taken so far.

    Raises:
        UserError: The files cannot be written.
    """
    try:
        # Keras's callback TensorBoard sets its own condition for everything that is written.
        with writer.as_default(step=step), tf.summary.record_if(True):
            yield
    except tf.errors.OpError as error:
        raise write_error(folder.logs, error) from None


def _arrays(values) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in values.items()}


def write_scalars(values) -> None:
    """Writes values to TensorBoard's default writer, with one tag per entry of a vector.

    Args:
        values: Dictionary from a name in `TAGS` to a number or an array (groups,).
    """
    for name, value in values.items():
        tag, description = TAGS[name]
        if np.ndim(value) == 0:
            tf.summary.scalar(tag, value, description=description)
        else:
            for group, entry in enumerate(value):
                tf.summary.scalar(f"{tag}/{group:02d}", entry, description=description)

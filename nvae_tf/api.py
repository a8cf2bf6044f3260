"""What `import nvae_tf` offers beside classes: training as a function, and a trained model."""

import concurrent.futures
import json
import zipfile
from pathlib import Path

import tensorflow as tf
import tf_keras

from nvae_tf import config as configuration
from nvae_tf.checks import checked_callbacks
from nvae_tf.config import Config
from nvae_tf.data.catalog import OWN
from nvae_tf.data.own import own_images
from nvae_tf.data.where import check_data
from nvae_tf.engine.xla_probe import probe
from nvae_tf.evaluation import loading
from nvae_tf.image_spec import ImageSpec
from nvae_tf.io.errors import UserError, short_message, short_repr
from nvae_tf.io.paths import is_regular, user_path
from nvae_tf.model import NVAE
from nvae_tf.run_folder import RunFolder
from nvae_tf.training import run
from nvae_tf.training.callbacks import Checkpoints, Curves, Termination
from nvae_tf.training.cluster import Cluster, cluster_of, lost_workers
from nvae_tf.training.fitting import check_callback

# Keys that say where the images of a recipe are and how they are read.
_OF_FILES = ("data", "image_size", "channels", "bits", "value_range", "alpha", "strict", "crop")
LARGEST_KERAS_CONFIG = 1_000_000  # bytes of the configuration in a .keras file; ours has 2,000


def load(path: str | Path) -> NVAE:
    """Loads a trained model.

    Args:
        path: Path of a run's folder; of a checkpoint in it, ``checkpoints/step-N``; of an official
            ``.pt`` file; or of a ``.keras`` file that `NVAE.save` wrote.

    Returns:
        The model with its trained weights; those of a run are moving averages, if training kept them,
        and those of a ``.keras`` file are the weights as they were. It has to be compiled before it is
        trained or scored by Keras's methods.

    Raises:
        UserError: There is no trained model at the path, or it is damaged.
    """
    given = user_path(str(path))
    if given.suffix == ".keras":
        return _load_keras(given)
    for folder in (given, *sorted(given.glob("[0-9]*"))):
        if is_regular(folder / "saved_model.pb"):
            raise UserError(
                f"{given}: an export, which is a program with signatures and not an NVAE: load it "
                f"with tf.saved_model.load({str(folder)!r}) (docs/serving.md), or name the run"
            )
    model = loading.load(str(path)).model
    model.weights_were_given = True
    return model


def train(
    config: str | Config,
    dataset=None,
    callbacks=(),
    *,
    folder: str | Path | None = None,
    image: ImageSpec | None = None,
    resume: bool = False,
    init_from: str | Path | None = None,
    **keys,
) -> dict[str, float] | None:
    """Trains as the command ``nvae-train`` does, with exact resume, and leaves a run's folder.

    It trains on the devices of the `tf.distribute` strategy in whose scope it is called.

    Args:
        config: Name of a recipe, path of a YAML file, or a `nvae_tf.config.Config`.
        dataset: Training and test images: a pair of arrays (n, height, width, channels) of levels,
            uint8 or uint16, or of finite `tf.data.Dataset`s of such images, which are read into memory;
            default: those that the recipe names.
        callbacks: Callbacks of Keras, or ours (`nvae_tf.callbacks`).
        folder: Path of the run's folder; default: ``runs/NAME`` for the recipe's name.
        image: Description of `dataset`; default: images of 8 bits of its shape. Those of uint16 need
            one.
        resume: Whether to continue the run in the folder from its newest checkpoint.
        init_from: A trained model, as for `load`, whose weights a new run begins with.
        **keys: Keys of the recipe that change; beside `dataset`, none that says how files are read.
            `flip` mirrors images of either at random.

    Returns:
        The test set's ``nelbo``, ``recon`` and ``kl`` in nats and ``bpd`` in bits per dimension; None
        if SIGTERM ended training early, with a checkpoint.

    Raises:
        UserError: An argument is wrong, or the data or the folder do not allow it.
        TrainingDivergedError: Too many steps in a row were skipped.
    """
    if not isinstance(config, (str, Path, Config)):
        raise UserError(
            f"config: {short_repr(config)} is not allowed; expected a recipe's name, the path of a "
            "YAML file or a Config"
        )
    if folder is not None:
        path = user_path(str(folder))
    elif isinstance(config, Config):
        raise UserError("folder: None is not allowed beside a Config, which has no name")
    else:
        path = Path("runs", Path(config).stem)
    own = None
    if dataset is not None:
        for key in _OF_FILES:
            if key in keys:
                raise UserError(
                    f"{key}: is for a recipe's own data set; `image` describes `dataset`"
                )
        own = own_images(dataset, image)
        keys["dataset"] = OWN
    elif image is not None:
        raise UserError("image: is for a dataset that is given; a recipe's images have their own")
    recipe = config if isinstance(config, Config) else configuration.load(str(config))
    recipe, note = configuration.override(recipe, keys)
    callbacks = checked_callbacks(callbacks)
    for callback in callbacks:
        _check_callback_of_train(callback, path)
    cluster = cluster_of(tf.distribute.get_strategy())
    if own is None:
        check_data(recipe.data)
    if note:
        cluster.say(note)
    run_folder = RunFolder(path)
    return run.train(
        recipe,
        run_folder,
        resume=resume,
        cluster=cluster,
        own=own,
        callbacks=callbacks,
        start_from=model_to_start_from(init_from, run_folder, resume, cluster),
        xla_problem=probe(recipe.train.jit_compile, in_use=True),
    )


def _check_callback_of_train(callback, folder: Path) -> None:
    """Refuses callbacks that `train` cannot run, or whose work it does by itself."""
    name = type(callback).__name__
    saves = isinstance(callback, Checkpoints) and callback.folder.path == folder
    if saves or isinstance(callback, (Curves, Termination)):
        raise UserError(f"callbacks: {name} is for fit; train does the same without it")
    if isinstance(callback, tf_keras.callbacks.BackupAndRestore):
        raise UserError(
            f"callbacks: {name} is for fit; train continues from its own checkpoints with resume=True"
        )
    check_callback(callback, sets_rate=False)


def model_to_start_from(
    init_from: str | Path | None, folder: RunFolder, resume: bool, cluster: Cluster
) -> NVAE | None:
    """Loads the model that a new run begins with; all workers call it at the same time.

    Args:
        init_from: A trained model, as for `load`; None: the run begins with new weights.
        folder: The run.
        resume: Whether the run is continued if it has begun; then the model need not exist any more.
        cluster: The workers.

    Returns:
        The model; None if there is none, or if the run continues from its own weights.

    Raises:
        UserError: The model cannot be loaded on one of the workers.
    """
    begun = resume and bool(folder.list_checkpoints())
    with lost_workers(cluster):
        # If one worker sees a checkpoint, all wait for it (see `nvae_tf.training.shared_folder`).
        if any(found for (found,) in cluster.gather_from_workers([int(begun)])):
            if init_from is not None:
                cluster.say(
                    f"--init_from: the run in {folder.path} has begun already and continues from its "
                    "own weights"
                )
            return None
        with cluster.agreement():
            if init_from is None:
                return None
            # In a thread of its own, which is in no strategy's scope: in that of several workers,
            # creating a model waits for the others, one of which may have failed.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                return pool.submit(load, init_from).result()


def _load_keras(path: Path) -> NVAE:
    """Reads a ``.keras`` file: values for the weights of an `NVAE`, and nothing that could run."""
    if not is_regular(path):
        raise UserError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo("config.json")
            if member.file_size > LARGEST_KERAS_CONFIG:
                raise ValueError(f"a configuration of {member.file_size} bytes")
            content = json.loads(archive.read(member))
        if content["class_name"] != "NVAE":
            raise ValueError(f"a {str(content['class_name'])[:40]}, not an NVAE")
        model = NVAE.from_config(content["config"])
        model.load_weights(path)
    except Exception as error:  # noqa: BLE001 - a damaged archive raises what it likes
        raise UserError(f"{path}: not readable as a saved NVAE ({short_message(error)})") from None
    return model

"""The trained model that a mode of ``evaluate_keras.py`` works on.

Functions import what needs TensorFlow, which takes seconds: by then the flags are known to be right.
"""

from nvae_tf.config import data_override
from nvae_tf.io.files import check_writable
from nvae_tf.io.paths import user_path

READJUSTING_BATCHES, READJUSTING_BATCH = 500, 16  # as in the official implementation


def load(arguments, *names: str):
    """Loads the model that the flags name.

    Args:
        arguments: The flags.
        *names: Names of the files that the mode writes.

    Returns:
        The model, and the paths of those files in the folder for results, in a list.

    Raises:
        UserError: There is no such model, or a file cannot be written.
    """
    from nvae_tf.evaluation import loading

    loaded = loading.load(arguments.checkpoint, data_override(arguments.data))
    output = user_path(arguments.output) if arguments.output else loaded.folder
    paths = [output / name for name in names]
    for path in paths:  # before hours of computing, not after them
        check_writable(path)
    name, groups = loaded.config.data.dataset, len(loaded.model.groups)
    print(f"model: {name}, {groups} latent groups, step {loaded.step}")
    return loaded, paths


def origin(loaded) -> str:
    """What the notes of pictures say of a model: its data set and its step."""
    return f"{loaded.config.data.dataset}, step {loaded.step:,}"


def statistics_at(arguments, model, temperature: float):
    """Computes batch-norm statistics over samples at a temperature."""
    from nvae_tf.evaluation.sampling import batch_norm_statistics

    statistics, left_out = batch_norm_statistics(
        model,
        temperature,
        batches=arguments.readjust_batches,
        batch_size=READJUSTING_BATCH,
        seed=arguments.seed,
    )
    if left_out:
        print(f"readjust: left out {left_out} of {arguments.readjust_batches} batches, not finite")
    return statistics

"""The command ``nvae-import``: an official checkpoint becomes the folder of a run."""

import sys
from pathlib import Path

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import Parser, nonempty, program
from nvae_tf.io.paths import user_path


def main(argv: list[str] | None = None) -> int:
    """Converts an official checkpoint.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains.
    """
    parser = Parser(
        prog=program("nvae-import"),
        description="Turn an official checkpoint into the folder of a run.",
    )
    parser.add_argument(
        "checkpoint", type=nonempty, help="a .pt file of the official implementation"
    )
    parser.add_argument("output", type=nonempty, help="the folder to make")
    arguments = parser.parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()
    return run_command(
        lambda: convert(user_path(arguments.checkpoint), user_path(arguments.output)),
        if_interrupted="nothing is complete",
    )


def convert(path: Path, output: Path) -> None:
    """Writes an official checkpoint as the folder of a run, from which training can continue.

    Weights, running averages and the step come from the file. The optimiser's moments start at zero,
    and the singular vectors are computed anew.

    Args:
        path: Path of the ``.pt`` file.
        output: Path of the folder to make.

    Raises:
        UserError: The file cannot be read or is not a checkpoint of NVAE, or the folder already holds a
            run.
    """
    # TensorFlow takes seconds to import: only after the flags are known to be right.
    from nvae_tf import torch_import
    from nvae_tf.data import catalog
    from nvae_tf.io.files import make_folder
    from nvae_tf.model import NVAE
    from nvae_tf.run_folder import RunFolder
    from nvae_tf.training.checkpoints import CheckpointManager
    from nvae_tf.training.optimizer_choice import make_optimizer
    from nvae_tf.training.trainer import Trainer

    official = torch_import.read(path)
    config, folder = official.config, RunFolder(output)
    folder.check(config, resume=False)
    model = NVAE(config.model, catalog.get_dataset_info(config.data).image)
    torch_import.load_state(model, official.state)
    optimizer = make_optimizer(config.train, config.train.learning_rate)
    trainer = Trainer(model, config.train, total_steps=1, optimizer=optimizer)
    optimizer.iterations.assign(official.step)
    trainer.warm_up_spectral_norms()
    make_folder(folder.checkpoints)
    CheckpointManager(folder, trainer, config.train.keep).save()
    folder.create(config)  # last, since it makes the folder a run
    print(
        f"read: {path}, {config.data.dataset}, {len(model.groups)} latent groups, step {official.step}"
    )
    print(f"run: {output}")


if __name__ == "__main__":
    sys.exit(main())

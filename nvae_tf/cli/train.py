"""The command ``train_keras.py``."""

import contextlib
import os
import signal
import sys
import time

from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import STOPPED_EARLY, run_command
from nvae_tf.cli.flags import (
    Parser,
    add_config_flags,
    at_least,
    configured,
    named_folder,
    nonempty,
    program,
)
from nvae_tf.data.where import check_data
from nvae_tf.engine.xla_flags import make_deterministic
from nvae_tf.io.errors import UserError
from nvae_tf.run_folder import RunFolder
from nvae_tf.training.rendezvous import JOIN_SECONDS


def main(argv: list[str] | None = None) -> int:
    """Trains a model.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0 once training and its last validation are complete; 75 if SIGTERM ended it
        before, with a checkpoint from which ``--cont_training`` continues; 3 if training diverged; 2
        for any other mistake or failure, which one line on standard error explains.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stopped:
        if stopped.code:
            _tell_others(UserError("a flag of its command is wrong; its own log says which"))
        raise
    if argv is None:  # this process is the command
        signal.signal(signal.SIGTERM, _stop_at_once)
        keep_out()
    return run_command(
        _train,
        arguments,
        if_interrupted="the same command with --cont_training continues from the newest checkpoint",
    )


def _parser() -> Parser:
    parser = Parser(
        prog=program("train_keras.py"),
        usage="%(prog)s --config NAME [--root DIR] [--save NAME] [--cont_training] [--KEY VALUE ...]",
        description="Train an NVAE from a recipe. Every key of a recipe is also a flag.",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--root",
        type=nonempty,
        default="runs",
        metavar="DIR",
        help="folder of runs (default: runs)",
    )
    run.add_argument(
        "--save",
        type=nonempty,
        metavar="NAME",
        help="name of the run in ROOT (default: the configuration's name)",
    )
    run.add_argument(
        "--cont_training",
        action="store_true",
        help="continue the run in ROOT/SAVE from its newest checkpoint",
    )
    run.add_argument(
        "--init_from",
        type=nonempty,
        metavar="RUN|FILE",
        help="begin a new run with the weights of a trained model: a run, a checkpoint in it, an "
        "official .pt file or a .keras file, of the same model and images of the same size; a run "
        "that has begun continues from its own weights",
    )
    run.add_argument(
        "--world_size",
        type=at_least(1),
        metavar="N",
        help="GPUs of this machine to train on (default: all). Several machines: the same command on "
        "each, with TF_CONFIG or under Slurm",
    )
    run.add_argument(
        "--join_timeout",
        type=at_least(1),
        default=JOIN_SECONDS,
        metavar="SECONDS",
        help=f"how long several workers wait for each other at the start (default: {JOIN_SECONDS})",
    )
    add_config_flags(parser)
    return parser


def _stop_at_once(*_):
    """What SIGTERM does before training: nothing was changed that a checkpoint could keep.

    A container's first process ignores SIGTERM unless a handler is installed.
    """
    with contextlib.suppress(OSError):  # nobody reads any more
        # Not through Python's buffers, which this may have interrupted.
        os.write(sys.stderr.fileno(), b"stopped by SIGTERM before training began\n")
    os._exit(STOPPED_EARLY)


def _tell_others(error: UserError) -> None:
    """Tells the other workers, if any, the error with which this one ends before joining them."""
    from nvae_tf.training.slurm import workers_of_step

    with contextlib.suppress(UserError):  # the error that ends the command is the one to report
        if "TF_CONFIG" in os.environ or workers_of_step(os.environ)[0]:
            from nvae_tf.training.cluster import refuse_to_join

            refuse_to_join(error)


def _train(arguments) -> int | None:
    start = time.monotonic()
    try:
        config, note = configured(arguments)
        check_data(config.data)
        folder = RunFolder(named_folder(arguments))
    except UserError as error:
        _tell_others(error)
        raise
    if config.train.deterministic:
        make_deterministic(os.environ)
    # TensorFlow takes seconds to import: only after the flags are known to be right.
    from nvae_tf.api import model_to_start_from
    from nvae_tf.engine.xla_probe import probe
    from nvae_tf.io.text import duration
    from nvae_tf.training.cluster import connect
    from nvae_tf.training.run import train

    xla_problem = probe(config.train.jit_compile)  # before this process takes the GPUs' memory
    cluster = connect(arguments.world_size, arguments.join_timeout)
    if note:
        cluster.say(note)
    results = train(
        config,
        folder,
        resume=arguments.cont_training,
        cluster=cluster,
        start_from=model_to_start_from(
            arguments.init_from, folder, arguments.cont_training, cluster
        ),
        xla_problem=xla_problem,
    )
    if results is None:
        return STOPPED_EARLY
    if signal.getsignal(signal.SIGTERM) is _stop_at_once:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # everything is done
    if not cluster.is_chief:
        return None
    print(f"test: nelbo {results['nelbo']:.2f} nats, {results['bpd']:.4f} bits per dim")
    print(f"time: {duration(time.monotonic() - start)}")
    print(f"written: {folder.path} (samples.png, reconstructions.png, checkpoints/)")
    print(f"curves: tensorboard --logdir {folder.logs}")
    print(f"next: nvae-evaluate --checkpoint {folder.path} --eval_mode sample --temp 0.7")
    return None

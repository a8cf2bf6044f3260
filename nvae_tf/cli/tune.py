"""The command ``tune_keras.py``."""

import os

from nvae_tf import config as configuration
from nvae_tf.cli.chatter import keep_out
from nvae_tf.cli.errors import run_command
from nvae_tf.cli.flags import (
    Parser,
    add_config_flags,
    at_least,
    configured,
    named_folder,
    nonempty,
    overrides,
    positive,
    program,
)
from nvae_tf.data.where import check_data
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import make_folder
from nvae_tf.io.paths import user_path
from nvae_tf.tuning.space import load_space

ALGORITHMS = ("hyperband", "bayesian", "random")
OBJECTIVES = ("bpd", "nelbo")


def main(argv: list[str] | None = None) -> int:
    """Searches for better values of a recipe's keys.

    Args:
        argv: Arguments of the command; default: those of the process.

    Returns:
        The exit status: 0, or 2 for a mistake or failure, which one line on standard error explains. It
        is also 2 if no trial was completed.
    """
    arguments = _parser().parse_args(argv)
    if argv is None:  # this process is the command
        keep_out()
    return run_command(_tune, arguments, if_interrupted="the same command with --resume goes on")


def _parser() -> Parser:
    parser = Parser(
        prog=program("tune_keras.py"),
        usage="%(prog)s --config NAME --space FILE [--root DIR] [--save NAME] [--resume] "
        "[--KEY VALUE ...]",
        description="Search for better values of a recipe's keys with keras-tuner. Every key of a "
        "recipe is also a flag, and holds for all trials.",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--space",
        type=nonempty,
        required=True,
        metavar="FILE",
        help="YAML: what to vary, for example learning_rate: {float: [1e-3, 3e-2], log: true}",
    )
    search.add_argument(
        "--algorithm", choices=ALGORITHMS, default="hyperband", help="default: hyperband"
    )
    search.add_argument(
        "--objective",
        choices=OBJECTIVES,
        default="bpd",
        help="what to minimise on the test set (default: bpd)",
    )
    search.add_argument(
        "--max_trials",
        type=at_least(1),
        default=10,
        metavar="N",
        help="number of trials of bayesian and random search; hyperband's follows from the recipe's "
        "epochs (default: 10)",
    )
    search.add_argument(
        "--factor",
        type=at_least(2),
        default=3,
        metavar="N",
        help="hyperband: one of N trials goes on, for N times the epochs (default: 3)",
    )
    search.add_argument(
        "--max_minutes", type=positive, metavar="X", help="after X minutes no new trial starts"
    )
    search.add_argument(
        "--root",
        type=nonempty,
        default="tuning",
        metavar="DIR",
        help="folder of searches (default: tuning)",
    )
    search.add_argument(
        "--save",
        type=nonempty,
        metavar="NAME",
        help="name of the search (default: the configuration's name)",
    )
    search.add_argument("--resume", action="store_true", help="continue the search in ROOT/SAVE")
    add_config_flags(parser)
    return parser


def _tune(arguments) -> None:
    check_data(configured(arguments).config.data)
    space = load_space(user_path(arguments.space))
    folder = named_folder(arguments)
    is_worker = "KERASTUNER_ORACLE_IP" in os.environ  # one of several, which share the folder
    if (folder / "oracle.json").exists() and not arguments.resume and not is_worker:
        raise UserError(
            f"{folder} holds a search already: continue it with --resume, or choose another name with "
            "--save"
        )
    make_folder(folder)
    try:
        import keras_tuner  # brings TensorFlow: only after the flags are known to be right
    except ImportError:
        raise UserError('keras-tuner is missing; pip install "nvae-tf[tune]"') from None
    from nvae_tf.tuning.search import BEST, TABLE, Limits, Search, is_chief

    limits = Limits(arguments.max_trials, arguments.max_minutes, arguments.factor)
    recipe, given = configuration.load(arguments.config), overrides(arguments)
    given.update(_found(recipe, given))
    search = Search(recipe, given, space, folder, arguments.algorithm, arguments.objective, limits)
    try:
        search.search()
    except keras_tuner.errors.FatalError as error:
        raise UserError(f"{error}; the same command with --resume goes on") from None
    if is_worker and not is_chief():
        return
    best = search.write_results()
    for line in _table(search.trials(), arguments.objective, [d.name for d in space]):
        print(line)
    print(f"written: {folder / TABLE}")
    print(f"pictures and curves: tensorboard --logdir {folder}")
    if best is None:
        raise UserError(f"no trial was completed; {folder / TABLE} says why")
    print(f"best: trial {best.id}, {arguments.objective} {best.score:.4f}")
    print(f"train with it: nvae-train --config {folder / BEST} --save NAME")


def _found(recipe, given) -> dict:
    """What the configuration leaves open of the images, found out once for all trials."""
    from nvae_tf.data import catalog

    data = configuration.override(recipe, given).config.data
    settled = catalog.settle(data)
    for line in (*settled.lines, *settled.dataset.skipped):
        print(line, flush=True)
    values = {name: getattr(settled.config, name) for name in catalog.FOUND}
    return {name: value for name, value in values.items() if value != getattr(data, name)}


def _table(trials, objective, names):
    """Yields lines of text: the best trial first, failed ones last."""

    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    completed = sorted(
        (t for t in trials if t.status == "completed"), key=lambda trial: trial.score
    )
    others = [trial for trial in trials if trial.status != "completed"]
    rows = [["trial", objective, "epochs", *names]]
    for trial in completed + others:
        score = f"{trial.score:.4f}" if trial.status == "completed" else trial.status
        values = [text(trial.values.get(name)) for name in names]
        rows.append([trial.id, score, str(trial.epochs), *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))

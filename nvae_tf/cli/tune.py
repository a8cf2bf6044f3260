"""The command ``tune_keras.py``."""

import contextlib
import json
import os
from pathlib import Path

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
from nvae_tf.io.errors import UserError, short_repr
from nvae_tf.io.files import read_json, write_json
from nvae_tf.io.lock import exclusive_lock
from nvae_tf.io.paths import user_path
from nvae_tf.tuning.space import load_space

DEFAULT_TRIALS, DEFAULT_FACTOR = 10, 3

ALGORITHMS = ("hyperband", "bayesian", "random")
OBJECTIVES = ("bpd", "nelbo")
SEARCH, LARGEST_SEARCH = "search.json", 1_000_000  # what a search is about, and bytes of that file
# Keys that may change when a search is continued: files, speed and memory.
MAY_CHANGE = (
    "data", "strict", "jit_compile", "gradient_checkpointing", "save_every", "log_every",
    "eval_every", "images_every", "keep",
)  # fmt: skip
KERASTUNER = ("KERASTUNER_TUNER_ID", "KERASTUNER_ORACLE_IP", "KERASTUNER_ORACLE_PORT")
PATTERN_CHARACTERS = "*?["


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
        metavar="N",
        help="number of trials of bayesian and random search; hyperband's follows from the recipe's "
        f"epochs (default: {DEFAULT_TRIALS})",
    )
    search.add_argument(
        "--factor",
        type=at_least(2),
        metavar="N",
        help="hyperband: one of N trials goes on, for N times the epochs "
        f"(default: {DEFAULT_FACTOR})",
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
    hyperband = arguments.algorithm == "hyperband"
    if hyperband and arguments.max_trials is not None:
        raise UserError(
            "--max_trials: hyperband's number of trials follows from --epochs and --factor; leave it "
            "out, or choose --algorithm random or bayesian"
        )
    if not hyperband and arguments.factor is not None:
        raise UserError("--factor: is for --algorithm hyperband; leave it out")
    arguments.max_trials = arguments.max_trials or DEFAULT_TRIALS
    arguments.factor = arguments.factor or DEFAULT_FACTOR
    space = load_space(user_path(arguments.space))
    folder = named_folder(arguments)
    is_worker = "KERASTUNER_ORACLE_IP" in os.environ  # one of several, which share the folder
    if (folder / "oracle.json").exists() and not arguments.resume and not is_worker:
        raise UserError(
            f"{folder} holds a search already: continue it with --resume, or choose another name with "
            "--save"
        )
    if set(PATTERN_CHARACTERS) & set(str(folder.absolute())):
        raise UserError(
            f"{folder}: keras-tuner takes {PATTERN_CHARACTERS} in names for patterns; choose another "
            "--root or --save"
        )
    given = [name for name in KERASTUNER if name in os.environ]
    if 0 < len(given) < len(KERASTUNER):
        raise UserError(f"{given[0]}: is set, but not all of {', '.join(KERASTUNER)}")
    leads = not is_worker or "chief" in os.environ[KERASTUNER[0]]
    with exclusive_lock(folder, "tuning") if leads else contextlib.nullcontext():
        if leads:
            _check_continues(arguments, space, folder)
        _search(arguments, space, folder, is_worker)


def _check_continues(arguments, space, folder: Path) -> None:
    """Writes what a search is about, or compares it with what is there."""
    settled = configured(arguments).config.to_dict()
    content = {
        **{name: value for name, value in settled.items() if name not in MAY_CHANGE},
        "space": [list(dimension) for dimension in space],
        **{name: getattr(arguments, name) for name in ("algorithm", "objective", "factor")},
    }
    content = json.loads(json.dumps(content))  # as the file has it
    if not (folder / SEARCH).exists():
        write_json(folder / SEARCH, content)
        return
    before = read_json(folder / SEARCH, LARGEST_SEARCH)
    for name, value in content.items():
        if before.get(name) != value:
            raise UserError(
                f"{name}: {short_repr(value)} does not continue the search in {folder}, which has "
                f"{short_repr(before.get(name))}; start another one with --save"
            )


def _search(arguments, space, folder: Path, is_worker: bool) -> None:
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

"""The search: keras-tuner chooses values, trials train with them, and the best become a recipe."""

import csv
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import keras_tuner
from keras_tuner import errors, oracles
from keras_tuner.engine.base_tuner import BaseTuner

from nvae_tf.config import Config, Overridden, check_value, override
from nvae_tf.config_keys import LARGEST_INT
from nvae_tf.io.errors import UserError, short_message
from nvae_tf.io.files import atomic_write, write_text
from nvae_tf.tuning.space import CHOICE, INT, Dimension
from nvae_tf.tuning.trial import TrialStopped, run_trial

BEST, TABLE = "best.yaml", "trials.csv"


class Limits(NamedTuple):
    """How far a search goes.

    Attributes:
        max_trials: Number of trials of Bayesian and random search.
        max_minutes: Minutes after which no new trial starts; None: no limit.
        factor: Hyperband's reduction factor: one of `factor` trials continues, for `factor` times the
            epochs.
    """

    max_trials: int = 10
    max_minutes: float | None = None
    factor: int = 3


class TrialSummary(NamedTuple):
    """A row of the table of trials.

    Attributes:
        id: Identifier in the name of the trial's folder.
        status: ``"completed"``, ``"failed"`` or ``"running"``.
        score: The objective; NaN unless completed.
        epochs: Number of epochs that it trained for.
        values: Values of the keys that the search varies.
        message: Why it failed, or an empty text.
    """

    id: str
    status: str
    score: float
    epochs: int
    values: dict
    message: str


class Search(BaseTuner):
    """A search over a space, kept in a folder, with a subfolder for each trial, which is a run.

    In keras-tuner's parallel mode (``KERASTUNER_TUNER_ID``, ``KERASTUNER_ORACLE_IP`` and
    ``KERASTUNER_ORACLE_PORT`` in the environment) the chief hands out trials and the others run them.

    Args:
        recipe: The recipe to improve, as its file has it.
        given: Values of the keys that all trials change in the recipe.
        space: What differs from trial to trial.
        folder: Folder of the search; a search that it already holds is continued.
        algorithm: ``"hyperband"``, ``"bayesian"`` or ``"random"``.
        objective: ``"bpd"`` or ``"nelbo"`` of the test set.
        limits: How far the search goes.

    Raises:
        ConfigError: The keys given do not go together.
        UserError: keras-tuner cannot read the search that the folder holds.
    """

    def __init__(
        self,
        recipe: Config,
        given: dict[str, Any],
        space: list[Dimension],
        folder: Path,
        algorithm: str = "hyperband",
        objective: str = "bpd",
        limits: Limits = Limits(),  # noqa: B008 - immutable
    ):
        self.recipe, self.given, self.folder, self.objective_name = recipe, given, folder, objective
        self.config = override(recipe, given).config
        self._names = [dimension.name for dimension in space]
        oracle = _oracle(self.config, space, algorithm, objective, limits)
        try:
            super().__init__(oracle, directory=str(folder.parent), project_name=folder.name)
        except (RuntimeError, ValueError, KeyError) as error:  # keras-tuner's, reading its files
            raise UserError(
                f"{folder}: keras-tuner cannot begin or continue a search there "
                f"({short_message(error)}); choose another --save"
            ) from None
        if not is_chief():  # The chief's oracle saves itself.
            self.save()  # So a search that ends in its first trial can be continued.

    def search(self):
        """Runs trials until the search is over; the chief of several processes hands them out."""
        with warnings.catch_warnings():
            # NumPy warns about the NaN of failed trials.
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            super().search()

    def run_trial(self, trial):
        """Trains with a trial's values; if that fails, the objective is NaN."""
        values = self._values(trial)
        assignments = " ".join(f"{name}={value}" for name, value in values.items())
        print(f"trial {trial.trial_id}: {assignments}", flush=True)
        hyperparameters = trial.hyperparameters.values
        parent = hyperparameters.get("tuner/trial_id")
        try:
            config, note = self._configured(values)
            if note:
                print(f"trial {trial.trial_id}: {note}", flush=True)
            results = run_trial(
                config,
                self._path(trial.trial_id),
                values,
                hyperparameters.get("tuner/epochs"),
                self._path(parent) if parent else None,
            )
        except TrialStopped as error:
            raise errors.FatalError(str(error)) from None
        except UserError as error:
            print(f"trial {trial.trial_id}: failed: {error}", flush=True)
            trial.message = str(error)
            return {self.objective_name: math.nan}
        score = results[self.objective_name]
        print(f"trial {trial.trial_id}: {self.objective_name} {score:.4f}", flush=True)
        return results

    def trials(self) -> list[TrialSummary]:
        """Returns all trials so far, in the order of their start."""
        summaries = []
        for trial_id in self.oracle.start_order:
            trial = self.oracle.trials[trial_id]
            status = {"COMPLETED": "completed", "RUNNING": "running"}.get(trial.status, "failed")
            values = self._values(trial)
            trained = trial.hyperparameters.values.get("tuner/epochs")
            summaries.append(
                TrialSummary(
                    id=trial_id,
                    status=status,
                    score=trial.score if status == "completed" else math.nan,
                    epochs=trained or self.config.train.epochs,
                    values=values,
                    message=trial.message or "",
                )
            )
        return summaries

    def write_results(self) -> TrialSummary | None:
        """Writes the table of trials, and the recipe of the best one if any is completed.

        Returns:
            The best trial, or None if no trial is completed.
        """
        trials = self.trials()
        with (
            atomic_write(self.folder / TABLE) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file)
            table.writerow(
                ["trial", "status", self.objective_name, "epochs", *self._names, "message"]
            )
            for trial in trials:
                values = [trial.values.get(name) for name in self._names]
                score = "" if math.isnan(trial.score) else trial.score
                row = [trial.id, trial.status, score, trial.epochs, *values, trial.message]
                table.writerow(row)
        completed = [trial for trial in trials if trial.status == "completed"]
        if not completed:
            return None
        best = min(completed, key=lambda trial: trial.score)
        head = (
            f"# Trial {best.id} of a search: {self.objective_name} {best.score:.4f} after "
            f"{best.epochs} epochs.\n"
        )
        write_text(self.folder / BEST, head + self._configured(best.values).config.to_yaml())
        return best

    def _configured(self, values: dict) -> Overridden:
        """Returns the configuration of a trial with these values."""
        return override(self.recipe, {**self.given, **values})

    def _values(self, trial):
        return {
            name: check_value(name, value)
            for name, value in trial.hyperparameters.values.items()
            if name in self._names
        }

    def _path(self, trial_id):
        return self.folder / f"trial_{trial_id}"


def is_chief() -> bool:
    """Whether this process hands out trials to others and runs none."""
    has_name = "chief" in os.environ.get("KERASTUNER_TUNER_ID", "")
    return has_name and "KERASTUNER_ORACLE_IP" in os.environ


def _oracle(config, space, algorithm, objective, limits):
    parameters = keras_tuner.HyperParameters()
    for dimension in space:
        _declare(parameters, dimension)
    common = dict(
        objective=keras_tuner.Objective(objective, "min"),
        hyperparameters=parameters,
        allow_new_entries=False,
        tune_new_entries=False,
        seed=config.data.seed or LARGEST_INT,  # keras-tuner draws one in place of 0
        max_consecutive_failed_trials=2**31,  # Failures do not end a search.
    )
    if algorithm == "hyperband":
        oracle = _Hyperband(
            limits.max_minutes, max_epochs=config.train.epochs, factor=limits.factor, **common
        )
    else:
        oracle_class = {"bayesian": _Bayesian, "random": _RandomSearch}[algorithm]
        oracle = oracle_class(limits.max_minutes, max_trials=limits.max_trials, **common)
    oracle.verbose = 0
    return oracle


class _TimeLimitedOracle(keras_tuner.Oracle):
    """An oracle that hands out no new trial after some minutes; None: no limit."""

    def __init__(self, max_minutes: float | None, **options):
        super().__init__(**options)
        self.end = math.inf if max_minutes is None else time.monotonic() + 60.0 * max_minutes

    def populate_space(self, trial_id):
        """Returns values for the next trial, as long as there is time."""
        if time.monotonic() < self.end:
            return super().populate_space(trial_id)
        return {"status": "IDLE" if self.ongoing_trials else "STOPPED"}


class _Hyperband(_TimeLimitedOracle, oracles.HyperbandOracle):
    pass


class _Bayesian(_TimeLimitedOracle, oracles.BayesianOptimizationOracle):
    pass


class _RandomSearch(_TimeLimitedOracle, oracles.RandomSearchOracle):
    pass


def _declare(parameters, dimension: Dimension) -> None:
    name, values = dimension.name, list(dimension.values)
    sampling = dict(sampling="log") if dimension.log else {}
    if dimension.kind == CHOICE:
        # As text: keras-tuner allows no choice between a word and a number, and takes true for 1.
        parameters.Choice(name, [str(value) for value in values])
    elif dimension.kind == INT:
        step = dict(step=dimension.step) if dimension.step else {}
        parameters.Int(name, *values, **step, **sampling)
    else:
        parameters.Float(name, *values, **sampling)

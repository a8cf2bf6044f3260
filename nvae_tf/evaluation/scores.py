"""The numbers that measure a model, as evaluations left them in its folder."""

from typing import NamedTuple

from nvae_tf.config import EXACT, OFFICIAL
from nvae_tf.evaluation.loading import LoadedModel
from nvae_tf.io.errors import UserError
from nvae_tf.io.files import read_json


class Score(NamedTuple):
    """A number that measures the model.

    Attributes:
        name: What it is.
        value: The number.
        unit: Its unit; empty if it has none.
        error: Standard error over the images; None if it is not known.
        per_dim: The number and its standard error in bits per dimension; None if it has no such form.
        origin: What it was computed from, such as the number of images of which set.
    """

    name: str
    value: float
    unit: str
    error: float | None
    per_dim: tuple[float, float | None] | None
    origin: str

    def text(self, plus_minus: str = "±") -> str:
        """The number and its standard error, in bits per dimension too if it has that form.

        Args:
            plus_minus: What stands before a standard error.
        """

        def spread(mean: float, error: float | None, digits: int) -> str:
            known = "" if error is None else f" {plus_minus} {error:.{digits}f}"
            return f"{mean:.{digits}f}{known}"

        number = f"{spread(self.value, self.error, 2)} {self.unit}".rstrip()
        return f"{number}, {spread(*self.per_dim, 4)} bits per dim" if self.per_dim else number


def evaluated(loaded: LoadedModel) -> list[Score]:
    """The likelihoods that ``--eval_mode evaluate`` left for this step's test images, or nothing.

    The model's own kind of likelihood comes first, and the name of a score by another one names it.
    """
    report = _report("evaluate.json", loaded)
    try:
        if report.get("split") != "test":
            return []
        origin = f"{report['num_images']:,} test images"
        draws, own = int(report["num_iw_samples"]), str(report.get("likelihood", ""))
        scores = likelihood_scores(report, draws, origin, own)
        for kind in (OFFICIAL, EXACT):
            if kind in report:
                others = likelihood_scores(report[kind], draws, origin, kind)
                scores += [score._replace(name=f"{score.name}, {kind}") for score in others]
        return scores
    except (KeyError, TypeError, ValueError):
        return []


def likelihood_scores(summary, draws: int, origin: str, kind: str) -> list[Score]:
    """The scores in what `likelihood.summarize` returned, or what was written of it.

    Args:
        summary: Mean and standard error of each estimate.
        draws: Number of draws of z for each image.
        origin: Which images they are.
        kind: Name of the likelihood of pixels; may be empty.
    """
    scores = []
    of_pixels = f", {kind} likelihood" if kind else ""
    for name, bits, title, detail in (
        ("nelbo", "bpd_nelbo", "NELBO", f"{draws} draws of z each"),
        ("neg_log_likelihood", "bpd_log_likelihood", "-log p(x)", f"{draws} weighted draws each"),
    ):
        (mean, error), per_dim = (
            (float(summary[key]["mean"]), _number(summary[key]["standard_error"]))
            for key in (name, bits)
        )
        scores.append(Score(title, mean, "nats", error, per_dim, f"{origin}, {detail}{of_pixels}"))
    return scores


def fid(loaded: LoadedModel) -> list[Score]:
    """The FID that ``--eval_mode evaluate_fid`` left for this step, or nothing."""
    report = _report("fid.json", loaded)
    try:
        origin = f"{report['num_samples']:,} samples at temperature {report['temperature']:g}" + (
            ", readjusted batch norm" if report["readjust_bn"] else ""
        )
        return [Score("FID", float(report["fid"]), "", None, None, origin)]
    except (KeyError, TypeError, ValueError):
        return []


def reported_model(loaded: LoadedModel) -> dict:
    """What a report says of its model: the step, and the name of an official file."""
    return {"step": loaded.step, **({"file": loaded.file} if loaded.file else {})}


def _report(name: str, loaded: LoadedModel) -> dict:
    """A report of a command, if there is one and it is of this model and step; else nothing."""
    try:
        report = read_json(loaded.folder / name)
    except UserError:
        return {}
    if not isinstance(report, dict) or report.get("file") != loaded.file:
        return {}
    return report if report.get("step") == loaded.step else {}


def _number(value) -> float | None:
    return None if value is None else float(value)

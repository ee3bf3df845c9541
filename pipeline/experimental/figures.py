"""What the tables say of a task's own figures; a task's file calls :func:`show` when it is imported."""

from collections.abc import Mapping

from qwt2.report.metrics import ACCURACY, HARD_LOSS, HEADLINE, METRICS, Metric


def show(task: str, accuracy: tuple[str, ...], hard_loss: float, metrics: Mapping[str, Metric]) -> None:
    """Give a task its place in tables and pages.

    Args:
        task: the task's name.
        accuracy: metrics that every baseline must have; the first is the headline, of which more is better.
        hard_loss: points of the headline; where plain PTQ loses at least as many, compensation must help.
        metrics: the metrics that no other task has.
    """
    METRICS.update(metrics)
    ACCURACY[task], HEADLINE[task], HARD_LOSS[task] = accuracy, accuracy[0], hard_loss

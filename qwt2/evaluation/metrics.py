"""Accuracy of logits, in NumPy."""

import numpy as np


def topk_percent(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share in percent (0-100) of rows of `logits` (N, classes) whose label is among the k largest.

    Ties are broken by the class number, so that the figure does not depend on the sort's internals.
    With fewer than k classes every row counts.
    """
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return 100.0 * float((best == labels[:, None]).any(axis=1).mean())


def agreement_percent(logits: np.ndarray, reference: np.ndarray) -> float:
    """Share in percent of rows for which two models, (N, classes) each, choose the same class."""
    return 100.0 * float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean())


def sqnr_db(logits: np.ndarray, reference: np.ndarray) -> float:
    """Power of the reference over power of the difference, in decibel; infinite where they are equal."""
    noise = np.square(logits.astype(np.float64) - reference).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise)) if noise else float("inf")

"""Accuracy of logits and of sentence vectors, computed in NumPy."""

import numpy as np


def topk_percent(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Return the share of rows whose label is among the k largest logits, in percent (0-100).

    Ties are broken by the class number, so that the result does not depend on the sort's internals.
    With fewer than k classes every row counts.

    Args:
        logits: (N, classes).
        labels: class numbers (N,).
        k: number of largest logits.
    """
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return 100.0 * float((best == labels[:, None]).any(axis=1).mean())


def agreement_percent(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the share of rows in percent for which two models choose the same class; both arrays are (N, classes)."""
    return 100.0 * float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean())


def sqnr_db(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the power of the reference over the power of the difference, in decibels; infinite for equal arrays."""
    noise = np.square(logits.astype(np.float64) - reference).sum()
    return float(10 * np.log10(np.square(reference, dtype=np.float64).sum() / noise)) if noise else float("inf")


def recall_at_1_percent(queries: np.ndarray, documents: np.ndarray) -> float:
    """Return the share of queries in percent whose nearest document is their own.

    Args:
        queries: vectors of unit length (N, d).
        documents: vectors of unit length (N, d); document i belongs to query i.
    """
    return 100.0 * float(own_document_is_nearest(queries, documents).mean())


def own_document_is_nearest(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Return for each query whether its nearest document is its own, bool (N,); arguments as above."""
    return (queries @ documents.T).argmax(axis=1) == np.arange(len(queries))


def cosine(vectors: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean cosine between the rows of two arrays (N, d)."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(reference, axis=1)
    return float(((vectors * reference).sum(axis=1) / lengths).mean())

"""Figures of merit against hand-made cases."""

import numpy as np
import pytest

from qwt2.evaluation.metrics import agreement_percent, sqnr_db, topk_percent


def test_topk_counts_labels_among_the_largest():
    logits = np.array([[3, 2, 1], [1, 2, 3], [2, 3, 1], [1, 3, 2]], np.float32)
    labels = np.array([0, 0, 0, 0])
    assert [topk_percent(logits, labels, k) for k in (1, 2, 3, 5)] == [25, 50, 100, 100]


def test_ties_go_to_the_lower_class():
    assert topk_percent(np.zeros((2, 4)), np.array([0, 1]), 1) == 50


def test_agreement_compares_the_chosen_classes():
    logits, reference = np.array([[1, 2], [2, 1.0]]), np.array([[0, 9], [0, 9.0]])
    assert agreement_percent(logits, reference) == 50


def test_sqnr_is_a_power_ratio_in_decibel():
    reference = np.array([[3.0, 4.0]], np.float32)
    assert sqnr_db(reference * np.float32(1.1), reference) == pytest.approx(20, abs=1e-3)
    assert sqnr_db(reference, reference) == float("inf")

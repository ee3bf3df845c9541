"""Compensations, one file each, which reads as its paper: `fit(walk, recipe)` changes the walk's model."""

from qwt2.registry import Registry

COMPENSATIONS: Registry = Registry("compensation method", __name__, "qwt2.compensations")

"""Classifiers, the counterpart of :mod:`qwt2.detection`.

This package builds the float classifier that a configuration describes, and loads its weights or trains them on a
dataset.
"""

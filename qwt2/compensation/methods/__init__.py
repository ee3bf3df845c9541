"""Compensation methods, one file each, written to follow their papers.

Each method registers a dataclass of its settings. Its method ``fit(walk, recipe)`` compensates the walk's model in
place. Its class attributes ``LABEL``, ``ORDER`` (among the methods) and ``COLOUR`` are for reports. Its property
``exportable`` tells whether integer engines can run the result.
"""

from qwt2.registry import Registry

COMPENSATIONS: Registry = Registry("compensation method", __name__, "qwt2.compensations")

"""Compensations, one file each, which reads as its paper: `fit(walk, recipe)` changes the walk's model.

What is registered is a dataclass of the settings. For reports it says its `LABEL`, its `ORDER` among the others and its
`COLOUR`; its property `exportable` tells whether integer engines can run what it makes with these settings.
"""

from qwt2.registry import Registry

COMPENSATIONS: Registry = Registry("compensation method", __name__, "qwt2.compensations")

"""PTQ methods, one file each: their grids, and how they are fitted."""

from qwt2.registry import Registry

PTQ_METHODS: Registry = Registry("PTQ method", __name__, "qwt2.ptq_methods")

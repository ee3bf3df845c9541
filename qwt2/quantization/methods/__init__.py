"""PTQ methods, one file each: how quantizers are laid out, and what happens after calibration."""

from qwt2.registry import Registry

PTQ_METHODS: Registry = Registry("PTQ method", __name__, "qwt2.ptq_methods")

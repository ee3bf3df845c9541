"""qwt2: post-training quantization with compensation that costs nothing at inference."""

import importlib

from qwt2.errors import Qwt2Error

_LAZY = {
    "Precision": "qwt2.precision",
    "quantize": "qwt2.quantization",
    "compensate": "qwt2.compensation",
    "fold": "qwt2.folding",
    "export_onnx": "qwt2.export",
    "load_engine": "qwt2.engines",
    "save_quantized": "qwt2.checkpoint",
    "load_quantized": "qwt2.checkpoint",
}

__all__ = ["Qwt2Error", *_LAZY]


def __getattr__(name: str):
    """Import on first use: evaluation runs engines only, and torch alone takes seconds to import."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qwt2' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value

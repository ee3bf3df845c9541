"""qwt2: post-training quantization with compensation that costs nothing at inference."""

import importlib
import sys
from typing import TYPE_CHECKING

if sys.version_info < (3, 11):  # noqa: UP036, a checkout is run without being installed
    raise ImportError(f"qwt2 needs Python 3.11 or newer; this is Python {sys.version.split()[0]}", name=__name__)

from qwt2.errors import Qwt2Error

if TYPE_CHECKING:
    from qwt2.checkpoint import load_quantized, save_quantized
    from qwt2.compensation.compensate import compensate
    from qwt2.engines import load_engine
    from qwt2.export import export_onnx
    from qwt2.folding.fold import fold
    from qwt2.quantization.allocation import allocate
    from qwt2.quantization.layers import full_precision
    from qwt2.quantization.precision import Precision
    from qwt2.quantization.quantize import quantize
    from qwt2.quantization.sensitivity import sensitivity

    __version__: str

_LAZY = {
    "Precision": "qwt2.quantization.precision",
    "quantize": "qwt2.quantization.quantize",
    "sensitivity": "qwt2.quantization.sensitivity",
    "allocate": "qwt2.quantization.allocation",
    "compensate": "qwt2.compensation.compensate",
    "fold": "qwt2.folding.fold",
    "export_onnx": "qwt2.export",
    "full_precision": "qwt2.quantization.layers",
    "load_engine": "qwt2.engines",
    "save_quantized": "qwt2.checkpoint",
    "load_quantized": "qwt2.checkpoint",
    "__version__": "qwt2.version",
}

__all__ = ["Qwt2Error", *_LAZY]


def __getattr__(name: str):
    """Import a name on its first use, because importing torch takes seconds and evaluation only runs engines."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qwt2' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value

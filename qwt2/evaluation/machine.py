"""Description of the machine of a measurement: CPU, instruction sets and versions.

It has no date and no host name, so that equal machines have equal descriptions.
"""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# Instruction sets that decide the kernel and speed of 8-bit integer products, in the spelling of /proc/cpuinfo.
_INTEGER_ISA = (
    *("sse4_2", "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)
_PACKAGES = ("torch", "timm", "onnx", "onnxruntime", "openvino", "numpy")


def describe() -> dict[str, Any]:
    """Return this CPU's name, architecture, usable cores and integer instruction sets, and the relevant versions."""
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_sets": [name for name in _INTEGER_ISA if name in flags],
        "versions": {"python": platform.python_version()}
        | {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    """Return the version of an installed package; ``None`` if it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """Return the fields of the first processor; empty if the system does not have /proc/cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}

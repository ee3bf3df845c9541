"""Command prefixes that take rights away from a command."""

import os
import shutil
import subprocess

import pytest


def in_namespace(*options: str) -> list[str]:
    """Return a prefix that runs a command in the Linux namespace that these options of ``unshare`` make."""
    command = ["unshare", "--map-root-user", *options]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let `unshare` make a namespace")
    return command


def unprivileged() -> list[str]:
    """Return a prefix that takes root's right to write anywhere away from a command."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and there is no setpriv to give that up")
    return ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]

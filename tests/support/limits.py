"""Command prefixes under which a command may do less than this process may."""

import os
import shutil
import subprocess

import pytest


def in_namespace(*options: str) -> list[str]:
    """In a namespace of Linux's that these options of `unshare` make."""
    command = ["unshare", "--map-root-user", *options]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("this system does not let `unshare` make a namespace")
    return command


def unprivileged() -> list[str]:
    """Without root's right to write anywhere."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root may write anywhere, and there is no setpriv to give that up")
    return ["setpriv", "--bounding-set", "-dac_override", "--inh-caps", "-dac_override"]

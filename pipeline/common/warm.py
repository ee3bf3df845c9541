"""Run a command whose stages start warm: `python -m pipeline.common.warm dvc repro`.

Importing torch and timm, or mmdet, would cost each of some fifty stages several seconds. Here one process imports them
once, when the first stage asks, and such stages run in forks of it. Only third-party libraries are shared: a stage's own
code is imported after the fork, except for what mmdet cannot be imported without (`qwt2.detection.ops`). Without this
wrapper every stage runs in its own process, with the same results.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

_ADDRESS = "QWT2_WARM"
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0
# What torch.onnx.export imports when it first runs, for seconds.
_IMPORTED_BY_EXPORTS = (
    "networkx", "onnx.reference", "onnxscript.function_libs.torch_lib.ops", "sympy.combinatorics",
    "torch._inductor.decomposition", "torch.onnx._internal.exporter._core",
)  # fmt: skip


def delegate(detects: bool = False) -> int | None:
    """Have the warm process run the module that is `__main__`, with this process's arguments and streams.

    Args:
        detects: whether it will need mmdet too.

    Returns:
        The stage's exit code; None if there is no warm process, so that the caller must do the work itself.
    """
    address = os.environ.pop(_ADDRESS, None)
    if address is None:
        return None
    module = sys.modules["__main__"].__spec__.name
    request = {
        "module": module, "argv": sys.argv, "folder": os.getcwd(), "environment": dict(os.environ), "detects": detects
    }  # fmt: skip
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(address)
        except OSError:  # it was killed
            return None
        socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        answer = connection.makefile().readline()
    if not answer:
        raise SystemExit(f"error: the process that ran {module} was killed; run again")
    return int(answer)


def main(command: list[str]) -> int:
    """Run `command` and serve the stages it starts; returns its exit code."""
    from pipeline.common.locks import release_abandoned  # here, as every stage imports this module

    release_abandoned()
    workers: set[int] = set()
    with tempfile.TemporaryDirectory(prefix="qwt2-") as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder) / "warm")
        listener.bind(address)
        listener.listen()
        listener.settimeout(_POLL_SECONDS)
        process = subprocess.Popen(command, env=os.environ | {_ADDRESS: address})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the command too, and that decides when to end
        while process.poll() is None:
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                pass
            else:
                if pid := _start(connection):
                    workers.add(pid)
            workers = {pid for pid in workers if os.waitpid(pid, os.WNOHANG)[0] == 0}
    for pid in workers:
        os.waitpid(pid, 0)
    return process.returncode


def _start(connection: socket.socket) -> int | None:
    """Fork a process that does what `connection` asks; its pid. None where the asker is gone."""
    request, streams = _receive(connection)
    pid = None
    if request is not None:
        _import_libraries(request["detects"])
        gc.freeze()  # or each collection in a fork would go through all that is imported
        pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.register_at_fork(after_in_child=connection.close)  # or the asker would wait for the worker's own forks
        os._exit(_work(connection, request, streams))
    connection.close()
    for stream in streams:
        os.close(stream)
    return pid


def _receive(connection: socket.socket) -> tuple[dict | None, list[int]]:
    """What is asked for, and the asker's standard streams."""
    connection.setblocking(True)
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    while not data.endswith(b"\n"):
        more = connection.recv(1 << 16)
        if not more:
            return None, streams
        data += more
    return json.loads(data), streams


def _import_libraries(detection: bool) -> None:
    import timm  # noqa: F401
    import torch  # noqa: F401

    for name in _IMPORTED_BY_EXPORTS:
        with suppress(ImportError):  # some are internal to torch
            importlib.import_module(name)
    if detection:
        with suppress(Exception):  # the stage itself will meet it, and tell
            # Imported by name, as most stages do not depend on it.
            importlib.import_module("qwt2.detection.ops").ensure_operators()
            from mmdet.utils import register_all_modules

            register_all_modules(init_default_scope=False)


def _work(connection: socket.socket, request: dict, streams: list[int]) -> int:
    for stream, copy in enumerate(streams):
        os.dup2(copy, stream)
        os.close(copy)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]
    finished = threading.Event()
    threading.Thread(target=_end_with, args=[connection, finished], daemon=True).start()
    code = _run(request["module"])
    sys.stdout.flush()
    sys.stderr.flush()
    finished.set()
    connection.sendall(f"{code}\n".encode())
    return code


def _end_with(connection: socket.socket, finished: threading.Event) -> None:
    """End this process and its forks if the process that asked for the work goes before it is finished."""
    connection.recv(1)
    if finished.is_set():
        return
    os.killpg(0, signal.SIGINT)
    time.sleep(_GRACE_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _run(module: str) -> int:
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""Several processes find what one process finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import processes

ROOT = Path(__file__).parents[2]
TASKS = ["vit,repq,cwac", "resnet,percentile,qwt", "swin,gptq,refit", "vit,gptaq,none", "resnet,erq,none"]
REFUSED = {
    "vit,repq,other_images": "processes 0 and 1 have different calibration images",
    "vit,repq,too_few": "2 processes share 1 calibration batches",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes found, a file per task and process."""
    found = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.support.processes", str(found), *TASKS, *REFUSED]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_find_what_one_finds(folder, task):
    both = [load_file(folder / f"{task}-{rank}") for rank in range(2)]
    alone = processes.result(task, None)
    for name, tensor in alone.items():
        assert both[0][name].equal(both[1][name]), name
        torch.testing.assert_close(both[0][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        if not tensor.is_floating_point():
            assert both[0][name].equal(tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("task", REFUSED)
def test_all_processes_refuse_what_they_cannot_share(folder, task):
    for rank in range(2):
        assert (folder / f"{task}-{rank}").read_text().startswith(REFUSED[task])


def test_the_command_speaks_in_a_process_that_another_launcher_numbered(tmp_path):
    command = [sys.executable, "-m", "qwt2", "vit", "--images", str(tmp_path / "no"), "--output", str(tmp_path / "a.onnx")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"RANK": "1"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "is no folder" in done.stderr

"""A program for ``torchrun``: every process quantizes, compensates and stores what it got.

Its arguments are a folder and what to do: "PTQ METHOD:COMPENSATION" pairs, or the name of something that must fail.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import qwt2
from qwt2.errors import Qwt2Error
from tests.support import tiny_models as tiny


def main(folder: Path, *tasks: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group, rank = dist.group.WORLD, dist.get_rank()
    for task in tasks:
        path = folder / f"{task}-{rank}"
        try:
            save_file(result(task, group, rank), path)
        except Qwt2Error as error:
            path.write_text(str(error))
    dist.destroy_process_group()


def result(task: str, group: dist.ProcessGroup | None, rank: int = 0) -> dict[str, torch.Tensor]:
    """Return the tensors of a tiny network that was quantized and compensated as the task says."""
    network, ptq, compensation = task.split(",")
    batches = tiny.batches(20, 4, seed=rank if compensation == "other_images" else 0)
    batches = batches[:1] if compensation == "too_few" else batches
    qmodel = qwt2.quantize(tiny.BUILDERS[network](), batches, ptq, qwt2.Precision(3, 4), observer_images=8, group=group)
    if compensation in ("too_few", "other_images"):
        compensation = "cwac"
    if compensation != "none":
        qwt2.compensate(qmodel, batches, compensation, group=group)
    return {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

"""Stage `baseline`: the full-precision model, trained from scratch or loaded, and its accuracy and latency."""

import time

from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    import torch

    from pipeline.models import open_cell_dataset, simulate
    from qwt2.io import read_array, save_tensors, write_json
    from qwt2.metrics import topk_percent
    from qwt2.models import build_model
    from qwt2.training import train

    dataset, settings = open_cell_dataset(cfg), cfg["model"]
    model = build_model({**settings, "num_classes": cfg["data"]["num_classes"]}, cfg["data"]["seed"])
    started = time.perf_counter()
    if settings["train"] is not None:
        torch.set_num_threads(cfg["training_threads"])
        train(model, dataset, settings["train"])
        torch.set_num_threads(cfg["threads"])
    seconds = time.perf_counter() - started
    save_tensors(cell.baseline / "model.safetensors", model.state_dict())
    simulate(model, dataset, cell.baseline / "logits.npy")
    logits, labels = read_array(cell.baseline / "logits.npy"), dataset.labels("val")
    write_json(
        cell.baseline / "metrics.json",
        {"top1": topk_percent(logits, labels, 1), "top5": topk_percent(logits, labels, 5), "train_seconds": seconds},
    )


if __name__ == "__main__":
    run_stage("baseline", main)

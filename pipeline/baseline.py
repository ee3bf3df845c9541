"""Stage `baseline`: the full-precision model, trained from scratch or loaded, and its accuracy."""

from pipeline.logs import LOG
from pipeline.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    from pipeline.models import open_cell_dataset, simulate
    from qwt2.io import read_array, save_tensors, write_json
    from qwt2.metrics import topk_percent
    from qwt2.models import build_model
    from qwt2.training import train

    dataset, training = open_cell_dataset(cfg, cell), cfg["model"]["train"]
    model = build_model({**cfg["model"], "num_classes": dataset.num_classes}, training["seed"] if training else 0)
    if training:
        train(model, dataset, training)
    save_tensors(cell.baseline / "model.safetensors", model.state_dict())
    simulate(model, dataset, cell.baseline / "logits.npy")
    logits, labels = read_array(cell.baseline / "logits.npy"), dataset.labels("val")
    # Nothing here may depend on the clock: later stages run again when a byte of this folder changes.
    metrics = {f"top{k}": topk_percent(logits, labels, k) for k in (1, 5)}
    write_json(cell.baseline / "metrics.json", metrics)
    message = f"{cfg['model']['name']}: top-1 {metrics['top1']:.2f} %"
    LOG.info(message)
    print(message)


if __name__ == "__main__":
    run_stage("baseline", main, runs_networks=True)

"""Stage ``baseline``: the full-precision model, trained from scratch or loaded, and its accuracy."""

from pipeline.common.logs import LOG
from pipeline.common.stage import Cell, run_stage


def main(cfg, cell: Cell) -> None:
    """Store the model's weights, its predictions on the validation set, and their accuracy."""
    from pipeline.tasks import open_task
    from qwt2.io import save_tensors, write_json

    task = open_task(cfg, cell)
    network = task.trained()
    save_tensors(cell.baseline / "model.safetensors", task.weights(network))
    task.predict(network, cell.predictions)
    # Nothing here may depend on the clock: later stages run again when a byte of this folder changes.
    metrics = task.fp32_figures()
    write_json(cell.baseline / "metrics.json", metrics)
    message = f"{cfg['model']['name']}: " + ", ".join(f"{name} {value:.2f} %" for name, value in metrics.items())
    LOG.info(message)
    print(message)


if __name__ == "__main__":
    run_stage("baseline", main)

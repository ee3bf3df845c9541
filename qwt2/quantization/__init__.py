"""From a captured float model and calibration batches to a model whose layers and products are fake-quantized."""

"""From a quantized model and a calibration set to a compensated one: QwT and QwT-v2's CWAC."""

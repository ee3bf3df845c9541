"""Compensation of a quantized model on a calibration set: QwT, and CWAC of QwT-v2."""

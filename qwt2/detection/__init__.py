"""Detectors: models of mmdet with its configurations and metrics, quantized and run on engines like classifiers."""

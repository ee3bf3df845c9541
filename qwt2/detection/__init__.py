"""Detectors: mmdet's models, configurations and scoring, quantized and run on integer engines like classifiers."""

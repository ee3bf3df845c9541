"""Measurements of models and engines.

This package measures accuracy, latency, size and differences between two executions of one model, and describes the
machine of a measurement.
"""

"""Placement and calibration of quantizers.

The input is a float model, calibration batches and bit widths. The output is a model whose layers and products are
fake-quantized, with a record of how each module was quantized.
"""

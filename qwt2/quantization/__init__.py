"""Which quantizer stands where, with which range.

In come a float model, calibration batches and bit widths; out comes a model whose layers and products are
fake-quantized, and a record of what was quantized how.
"""

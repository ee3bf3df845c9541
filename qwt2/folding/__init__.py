"""Conversion of the simulation to integers.

The input is a quantized model, compensated or not. The output is a model of integer modules, which engines run; the
compensation is folded into their scales and biases.
"""

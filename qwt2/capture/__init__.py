"""Capture of a model as a graph of operations.

The input is a float model and an example batch. The output is a graph in execution order. Layers, products and
additions that can be quantized are named modules in it, and they are grouped into blocks. This package chooses no
quantizer and no range.
"""

"""ONNX graphs run by PyTorch.

In comes an exported model; out comes something that computes it with PyTorch's operations: what engines that have no
ONNX reader of their own are made of.
"""

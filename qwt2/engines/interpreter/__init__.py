"""Execution of ONNX graphs in PyTorch.

This package turns an exported model into a callable of PyTorch operations. Engines without an ONNX reader of their own
build on it.
"""

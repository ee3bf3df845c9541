"""The files that engines read.

In comes an integer model; out comes an ONNX file whose graph engines run in integers. What is read from such files,
whole or module by module, is here too.
"""

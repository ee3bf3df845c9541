"""ONNX files for integer engines.

This package exports an integer model to an ONNX file, rewrites its graph so that engines run it in integers, and reads
such files, whole or module by module.
"""

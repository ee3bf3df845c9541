"""From an integer model to an ONNX file that engines run in integers, and what is read from such files."""

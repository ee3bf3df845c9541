"""ONNX graphs run by PyTorch: what engines that have no ONNX reader of their own are made of."""

"""What a model computes.

In come a float model and an example batch; out comes what runs, in which order and under which name: the layers,
products and additions that can be quantized, and the blocks that they form. Nothing here chooses a quantizer or a
range.
"""

"""From simulation to integers.

In comes a quantized, perhaps compensated model; out comes the model of integer modules that engines run. Compensation
is gone into their scales and biases.
"""

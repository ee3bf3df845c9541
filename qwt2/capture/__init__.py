"""What a model computes: from a float model and an example batch to a graph of operations with names."""

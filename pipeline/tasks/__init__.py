"""A task is what the stages ask of models of one kind: networks, calibration inputs, predictions, figures."""

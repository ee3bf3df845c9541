"""Classifiers: building, loading, training and running them. The counterpart of `qwt2.detection`."""

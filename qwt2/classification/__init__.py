"""Classifiers, the counterpart of `qwt2.detection`.

In come a model's configuration and a dataset; out comes the float classifier, with weights loaded or trained.
"""

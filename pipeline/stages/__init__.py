"""The stages of dvc.yaml, one module each: read the resolved configuration, call ``qwt2``, write one folder."""

"""Tasks beyond the grid's: micro networks that are trained here, so that their accuracy is real.

No cell of the grid runs them, so the hashes of its stages do not cover these files. A sweep's cells have the hash of
their own task in addition. Each task's file imports its dataset, which registers itself.
"""

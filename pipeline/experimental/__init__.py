"""Tasks beyond the grid's, in sweeps only: micro networks that are trained here, so that their accuracy is real.

No stage's code hash covers these files (``pipeline.build.code_hashes``), because no cell of the grid runs them. A
sweep's cells have the hash of their own task in addition. Each task's file imports its dataset, which registers itself.
"""

import importlib

for task in ("diffusion", "language", "zero_shot"):  # by name, so that no task's hash covers the others' files
    importlib.import_module(f"{__name__}.{task}")

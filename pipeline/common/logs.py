"""A log file for every stage and cell, and how much of it reaches the terminal."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = logging.getLogger("pipeline")
VERBOSE = "QWT2_VERBOSE"  # an environment variable, so that worker processes and stages under DVC obey too


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write log messages and warnings of the block into `path`, anew; with `-v` on stderr too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handlers = [logging.FileHandler(path, mode="w", encoding="utf-8")]
    if os.environ.get(VERBOSE):
        handlers.append(logging.StreamHandler(sys.stderr))
    loggers = [LOG, logging.getLogger("py.warnings")]
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for logger in loggers:
            logger.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    LOG.propagate = False
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for handler in handlers:
            for logger in loggers:
                logger.removeHandler(handler)
            handler.close()

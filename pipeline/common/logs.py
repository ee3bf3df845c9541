"""A log file per stage and cell; an environment variable shows it on the terminal too."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = logging.getLogger("pipeline")
VERBOSE = "QWT2_VERBOSE"  # an environment variable reaches worker processes, and stages that DVC starts


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Write a block's log messages and warnings into ``path``, replacing the file; with ``-v`` also to stderr."""
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

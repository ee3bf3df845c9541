"""Command: rewrite params.yaml, the cell that stage ``trial`` runs, from conf/ (``python -m pipeline.sweeps.params``).

``dvc exp run -S`` composes the file in the same way. A test checks that the committed file equals the default cell.
"""

import sys

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from pipeline.build.compose import CONF, one_sentence
from pipeline.sweeps.trial import PARAMS
from qwt2.errors import Qwt2Error, guarded
from qwt2.io import write_text


def text(overrides: list[str] | None = None) -> str:
    """Return the composed cell as DVC writes it.

    Raises:
        Qwt2Error: it cannot be composed.
    """
    try:
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            cfg = compose("cell", overrides or [])
    except (HydraException, yaml.YAMLError) as error:
        raise Qwt2Error(one_sentence(error, overrides or [])) from error
    OmegaConf.resolve(cfg)
    return OmegaConf.to_yaml(cfg)


if __name__ == "__main__":
    guarded(lambda: write_text(PARAMS, text(sys.argv[1:])))

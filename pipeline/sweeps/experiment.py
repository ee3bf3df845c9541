r"""Command: run one cell, or a sweep of cells (``-m``), through the whole chain.

The keys are those of conf/cell.yaml, and conf/experiment/ holds ready sweeps:

    python -m pipeline.sweeps.experiment -m model=vit_micro,swin_micro precision=w3a3,w4a4 \
        compensation=qwt,cwac seed=0,1,2

Several experiments (``experiment=free_accuracy,free_accuracy_ptq``) run one after another and share a table. Data and
baselines that DVC built are reused. Finished cells are skipped. A cell that fails does not stop the others.
"""

import os
import re
import sys
from collections import Counter
from concurrent.futures import BrokenExecutor

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from submitit.core.utils import UncompletedJobError

from pipeline.build.compose import CONF, one_sentence
from pipeline.build.dvcfiles import stages
from pipeline.common.logs import VERBOSE
from pipeline.sweeps.published import comparison
from pipeline.sweeps.regained import regained
from pipeline.sweeps.sweep import (
    PRINTED,
    SWEEPS,
    jobs,
    only_runner,
    progress,
    run_job,
    sweep_name,
    table_text,
    write_table,
)
from qwt2.errors import Qwt2Error, guarded

TEXTS = dict(zip(PRINTED, (table_text, regained, comparison)))


def main(arguments: list[str]) -> None:
    """Run the cells that the arguments ask for and print what they show; exit with code 1 if a cell failed.

    Raises:
        Qwt2Error: the configuration cannot be composed; nothing has run then.
    """
    if {"-v", "--verbose"} & set(arguments):
        os.environ[VERBOSE] = "1"
    arguments = [argument for argument in arguments if argument not in ("-v", "--verbose")]
    if any(argument in ("--help", "-h", "--cfg", "-c", "--info", "-i", "--hydra-help") for argument in arguments):
        return _hydra([*arguments, "sweep=shown"])
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    stages()  # refuses to run anywhere but in the repository
    name = _name(overrides)
    with only_runner(name), progress(name):
        for one in _experiments(arguments):
            _hydra([*one, f"sweep='{name}'"])  # quoted: a name may look like a number
    records = jobs(name)
    kind = records[0]["printed"] if records else "table"
    refused = bool(records) and all(record["cell"] is None for record in records)  # before anything ran
    if not refused or kind == "published":  # published figures are worth seeing without any of ours
        print(TEXTS[kind](name))
    if refused:
        raise Qwt2Error(records[0]["error"])
    write_table(name)
    counts = Counter(record["status"] for record in records)
    print(
        f"{', '.join(f'{count} {status}' for status, count in sorted(counts.items()))}; "
        f"table: {SWEEPS / name}/table.csv"
    )
    from pipeline.sweeps.page import write_page  # loads what draws charts

    if page := write_page(name):
        print(f"page: {page}")
    if counts["failed"]:
        raise SystemExit(1)


def _experiments(arguments: list[str]) -> list[list[str]]:
    """Return the arguments once per experiment that they name, without ``sweep``."""
    rest = [argument for argument in arguments if not argument.startswith("sweep=")]
    named = [argument for argument in rest if argument.startswith("experiment=")]
    others = [argument for argument in rest if argument not in named]
    names = named[-1].partition("=")[2].split(",") if named else []
    return [[*others, f"experiment={name}"] for name in names] or [others]


def _name(overrides: list[str]) -> str:
    given = [text.partition("=")[2] for text in overrides if text.startswith("sweep=")]
    if not given:
        return sweep_name(overrides)
    if not re.fullmatch(r"\w[\w.-]*", given[-1]):
        raise Qwt2Error(f"sweep is {given[-1]!r}; use letters, digits, '_', '-' and '.' for a folder's name")
    return given[-1]


def _hydra(arguments: list[str]) -> None:
    """Run Hydra's command line, and turn its errors into ``Qwt2Error``."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise instead of printing advice over many lines
    OmegaConf.register_new_resolver("cores_per", processes, replace=True)
    sys.argv = [sys.argv[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name="cell")(run_job)()
    except (BrokenExecutor, UncompletedJobError) as error:  # of the launchers that run cells in processes
        raise Qwt2Error(
            "a process that ran cells was killed (out of memory?); run again, finished cells are kept"
        ) from error
    except RuntimeError as error:
        if "Unknown plugin class" not in str(error):
            raise
        raise Qwt2Error("the launcher is not installed; see its file in conf/hydra/launcher for the package") from error
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        overrides = [argument for argument in arguments if not argument.startswith(("-", "sweep="))]
        raise Qwt2Error(one_sentence(error, overrides)) from error
    except ValueError as error:  # Hydra raises it when a group is given no name
        if "Config group override" not in str(error):
            raise
        group = next((text.partition("=")[0] for text in arguments if text.endswith("=null")), "a group")
        raise Qwt2Error(
            f"'{group}' is a group of configurations: give the name of one, or set its keys one by one"
        ) from error


def processes(threads: int) -> int:
    """Return how many processes with this many threads each fit on the machine's cores."""
    return max(1, len(os.sched_getaffinity(0)) // threads)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))

"""The commands of SLURM that submitit calls, for tests on one machine: each task of an array job runs by itself here.

`install(folder)` writes them into a folder for PATH. A task that asks to be queued again (`scontrol requeue`) starts
again when it ends. So does one that was killed, if the job's script has ``--requeue``. A file ``calls`` has every call.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")
JOB = "7"


def install(folder: Path) -> None:
    for command in COMMANDS:
        path = folder / command
        path.write_text(f'#!/bin/sh\necho {command} "$@" >> {folder}/calls\nexec {sys.executable} {__file__} {folder} {command} "$@"\n')
        path.chmod(0o755)


def sbatch(folder: Path, script: str) -> None:
    text = Path(script).read_text()
    (folder / "script").write_text(text)
    last = int(re.search(r"--array=0-(\d+)", text)[1])
    for task in range(last + 1):
        (folder / f"state-{JOB}_{task}").write_text("PENDING")
    subprocess.Popen([sys.executable, __file__, str(folder), "run", script, str(last)], start_new_session=True,
                     stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    print(f"Submitted batch job {JOB}")


def run(folder: Path, script: str, last: str) -> None:
    """Run all tasks of an array job, one after another, each until it is not queued again."""
    for task in range(int(last) + 1):
        name = f"{JOB}_{task}"
        state, again = folder / f"state-{name}", folder / f"requeue-{name}"
        variables = {"SLURM_JOB_ID": f"{JOB}{task}", "SLURM_ARRAY_JOB_ID": JOB, "SLURM_ARRAY_TASK_ID": str(task)}
        while True:
            state.write_text("RUNNING")
            done = subprocess.run(["bash", script], env=os.environ | variables)
            lost = done.returncode == 128 + 9 and "#SBATCH --requeue" in Path(script).read_text()
            if not (lost or again.exists()):
                break
            again.unlink(missing_ok=True)
        state.write_text("COMPLETED" if done.returncode == 0 else "FAILED")


def srun(folder: Path, *arguments: str) -> None:
    """Replace this process by the command behind srun's options, which have their values as words of their own."""
    words = list(arguments)
    while words[0].startswith("--"):
        del words[: 1 if words[0] == "--unbuffered" else 2]
    os.execvp(words[0], words)


def sacct(folder: Path, *arguments: str) -> None:
    print("JobID|State|NodeList")
    for path in sorted(folder.glob("state-*")):
        print(f"{path.name.removeprefix('state-')}|{path.read_text()}|here")


def scontrol(folder: Path, verb: str, job: str) -> None:
    assert verb == "requeue"
    (folder / f"requeue-{job}").touch()


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])

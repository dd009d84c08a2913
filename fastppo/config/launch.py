"""What the environment says of how this process was started, checked before anything waits for other processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from fastppo.errors import FastPPOError

NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Of launchers that start n processes and tell each its number, but not where the n are to meet: number, then count.
# srun tells a step's tasks in SLURM_STEP_NUM_TASKS; in a batch script SLURM_NTASKS are the tasks of the job.
STARTERS = (
    ("srun", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")),
    ("mpirun", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("mpirun", "PMI_RANK", ("PMI_SIZE",)),
    ("mpirun", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",)),
)


class LaunchError(FastPPOError):
    """Ranks that cannot find each other. The message names the variables, their values and the way out."""


def check_launch(environment: Mapping[str, str] = os.environ) -> None:
    """Whether this process was launched as one of a run's ranks, whole, or runs alone. Raises LaunchError."""
    if "RANK" not in environment:
        _check_alone(environment)
        return
    missing = [name for name in NEEDED if not environment.get(name)]
    if missing:
        found = ", ".join(f"{name} is {environment[name]}" for name in NEEDED if environment.get(name))
        raise LaunchError(
            f"the environment names a rank of several, but not all that it needs ({found or 'RANK is empty'};"
            f" {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set). {_way_out()}"
        )
    rank, local, size, port = (_number(environment, n) for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size or local >= size or port > 65535:
        said = ", ".join(f"{name} is {environment[name]}" for name in NEEDED)
        raise LaunchError(
            f"{said}: ranks are counted from 0, below WORLD_SIZE, and a port is at most 65535. {_way_out()}"
        )


def _check_alone(environment: Mapping[str, str]) -> None:
    size = environment.get("WORLD_SIZE", "")
    if size not in ("", "1"):
        raise LaunchError(f"WORLD_SIZE is {size} in the environment, and RANK is not set. {_way_out()}")
    for starter, number, counts in STARTERS:
        count = next((environment[name] for name in counts if environment.get(name)), "1")
        if number in environment and count.isdecimal() and int(count) > 1:
            raise LaunchError(_separate(starter, number, next(n for n in counts if environment.get(n)), count))


def first_of_many(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one of its node, or of all, that says what is wrong with them all."""
    numbers = ["LOCAL_RANK"] if "LOCAL_RANK" in environment else [number for _, number, _ in STARTERS]
    return all(environment.get(name, "0") in ("", "0") for name in numbers)


def _number(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdecimal():
        raise LaunchError(f"{name} is {environment[name]!r} in the environment, and no whole number. {_way_out()}")
    return int(environment[name])


def _script() -> str:
    return sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else "fastppo/train.py"


def _way_out() -> str:
    return (
        f"If these are left over from another program, `unset {' '.join(NEEDED)}`; else start the ranks with"
        f" `deepspeed {_script()} ...`, which sets them all."
    )


def _separate(starter: str, number: str, size: str, count: str) -> str:
    here = (
        f"this process is one of {count} that {starter} started ({size} is {count}), and nothing tells them where to"
        f" meet: they would be {count} separate runs."
    )
    if starter == "srun":
        return (
            f"{here} On one node start one process, which starts the ranks: `srun --ntasks=1 deepspeed {_script()}"
            " ...`. On several, or with a task a rank, tell each what it is: `export"
            ' MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500` and `srun bash'
            " -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
            f" LOCAL_SIZE=${{SLURM_NTASKS_PER_NODE:-1}} exec python {_script()} ...'`."
        )
    return (
        f"{here} Start the ranks with `deepspeed {_script()} ...` and without {starter}; a single process that runs"
        f" alone wants `env -u {number} -u {size}` before it."
    )

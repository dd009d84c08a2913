"""DPO on preference pairs: `deepspeed fastppo/train_dpo.py --model.path runs/sft/model --data.path pairs.jsonl`.

A language model learns to prefer the chosen answer of each pair by more than its start does, without a reward model
and without sampling (Rafailov et al., 2023). What comes out is a language model, as PPO's actor.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.config import DPO, DPOConfig
from fastppo.data import load_pairs
from fastppo.distributed import World
from fastppo.models import check_reference
from fastppo.monitor import lock_run_dir
from fastppo.offline import (
    DPO_STATISTICS,
    ReferenceLogprobs,
    direct_preference,
    evaluation_against,
    run,
    set_up,
    watching_chosen,
)
from fastppo.rank import run_rank


def train(config: DPOConfig, world: World) -> None:
    """A whole run: the reference's logprobs, then update, evaluate on held-out pairs, and leave the trained model with
    the lowest held-out loss.

    Raises Stopped where it was told to stop; what it has done is saved then, but for the reference's logprobs of a run
    that has not made them all.
    """
    with lock_run_dir(Path(config.output), world.rank):
        reference = ReferenceLogprobs(world)
        setup = set_up(
            config,
            world,
            partial(load_pairs, closed=False),
            saved={"reference": reference},
            check=check_reference,
            before=reference.compute_before,
        )
        reference.compute(setup)
        run(
            setup,
            direct_preference(config, reference.training),
            statistics=DPO_STATISTICS,
            evaluate=evaluation_against(reference.heldout),
            watch=watching_chosen(config, world),
        )


def main(argv: list[str] | None = None) -> None:
    run_rank(DPO, train, argv)


if __name__ == "__main__":
    main()

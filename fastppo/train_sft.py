"""Supervised fine-tuning: `deepspeed fastppo/train_sft.py --config quickstart-sft`.

A language model learns to write the responses of its data: the loss is their negative logprob, that of PPO's own head.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.config import SFT, SFTConfig
from fastppo.data import load_answers
from fastppo.distributed import World
from fastppo.monitor import lock_run_dir
from fastppo.offline import count_response_tokens, evaluate_answers, negative_logprob, run, set_up
from fastppo.rank import run_rank


def train(config: SFTConfig, world: World) -> None:
    """A whole run: update, evaluate on held-out responses, and leave the trained model with the lowest held-out loss.

    Raises Stopped where it was told to stop; what it has done is saved then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        run(
            set_up(config, world, load_answers),
            negative_logprob,
            statistics=("loss",),
            count=count_response_tokens,
            evaluate=evaluate_answers,
        )


def main(argv: list[str] | None = None) -> None:
    run_rank(SFT, train, argv)


if __name__ == "__main__":
    main()

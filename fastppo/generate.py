"""Scored responses of a model: `deepspeed fastppo/generate.py --model.path MODEL --data.path prompts.jsonl`.

Several responses to each prompt are drawn, scored by `rewards` and by the judge, and written with their tokens,
logprobs and the data's own columns. What is written is what `best_of_n`, `train_sft`, `train_reward` and `train_dpo`
read.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: Python would look for modules in the folder fastppo/ first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from fastppo.config import GENERATE, GenerateConfig
from fastppo.data import DataError
from fastppo.distributed import Stopped, World, stop, watching
from fastppo.generation import batch_metrics, draw, rows_of, set_up, tell, write_about
from fastppo.monitor import Phases, lock_run_dir
from fastppo.rank import run_rank
from fastppo.rewards import RewardError

log = logging.getLogger("fastppo")


def generate(config: GenerateConfig, world: World) -> None:
    """A whole run: draw, score and write a batch after the other.

    Raises Stopped where it was told to stop; all batches before are written then.
    """
    with lock_run_dir(Path(config.output), world.rank):
        setup = set_up(config, world)
        if setup is None:
            return
        counts, phases, written = setup.work.counts, Phases({}), setup.done
        with watching(world), setup.tracker as tracker:
            try:
                for number in range(setup.done, len(counts)):
                    stop.check(world)
                    prompts, scored = draw(setup, number, phases)
                    # The line of a batch comes before the batch: a run that is continued finds lines for all that is
                    # there, and removes the one that has no batch.
                    tracker.log(number + 1, batch_metrics(scored, phases.take()))
                    if number == 0:
                        write_about(config, setup.work.data, world)
                    setup.store.write(number, rows_of(setup, prompts, scored))
                    written = number + 1
            except (Stopped, RewardError, DataError) as error:
                cause = "stopped by a signal" if isinstance(error, Stopped) else "ended by an error"
                log.info(
                    "%s: %d of %d responses are written; --resume auto continues",
                    *(cause, sum(counts[:written]), sum(counts)),
                )
                raise
        tell(setup)


def main(argv: list[str] | None = None) -> None:
    run_rank(GENERATE, generate, argv)


if __name__ == "__main__":
    main()

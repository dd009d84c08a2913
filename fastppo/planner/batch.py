"""What one rank computes at once, from the settings of a run. Arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastppo.config import OnlineConfig, ResponseSettings
from fastppo.rollout import bucket


@dataclass(frozen=True)
class Batch:
    """What one rank, or a group that splits rows, computes at once when every prompt and response is as long as it may
    be."""

    sequences: int  # of a microbatch
    length: int  # tokens of a sequence
    responses: int  # response tokens of a microbatch, or scored ones
    tokens: int = 0  # of the rank's part of the batch, whose prefix is kept
    rows: int = 0  # of the sampler's cache
    prompt: int = 0  # tokens
    prefilled: int = 0  # prompts that the sampler computes at once
    continued: int = 0  # tokens of a prompt and its response so far, which it computes alone; 0: it continues none
    split: int = 1  # ranks that split the tokens of a microbatch

    @property
    def own_responses(self) -> int:
        """Response tokens of a microbatch that are one rank's, if they lie as evenly as its tokens."""
        return -(-self.responses // self.split)

    @staticmethod
    def of(config: OnlineConfig, ranks: int) -> Batch:
        prompt = config.data.first_tokens or config.data.max_prompt_tokens
        new = config.sampling.max_new_tokens
        length = prompt + new
        sequences = in_microbatch(-(-config.learned_together // _groups(config, ranks)), length, config)
        mine, heldout = -(-config.drawn_together // ranks), -(-config.eval.prompts // ranks)
        sampled = -(-(config.drawn_together + config.in_flight_together) // ranks)
        rows = rows_of(config, max(sampled, heldout))
        drawn = prompts_of(min(rows, sampled), config.sampling.samples_per_prompt)
        prefilled = max(drawn, min(rows, heldout))  # held-out prompts get one response each
        continued = length if config.in_flight_together else 0
        sampled_with = (rows, prompt, prefilled, continued)
        return Batch(sequences, length, sequences * new, mine * length, *sampled_with, config.sequence_ranks)

    def asked(self, phase: str, config: OnlineConfig, ranks: int) -> Batch:
        """The same rank's microbatch in a phase that computes no gradient, in a step or in an evaluation.

        Responses are scored, and held-out ones read, in as few microbatches as a rank's whole batch fits into; they are
        measured so too where that is not done in the microbatches of learning.
        """
        groups = _groups(config, ranks)
        heldout = in_microbatch(-(-config.eval.prompts // groups), self.length, config)
        mine = in_microbatch(-(-config.drawn_together // groups), self.length, config)
        together = phase == "feedback" or not config.learns_as_measured
        sequences = max(heldout, mine if together else self.sequences)
        return replace(self, sequences=sequences, responses=sequences * (self.length - self.prompt))

    def with_texts(self, count: int, length: int, config: OnlineConfig, ranks: int) -> Batch:
        """The same rank's batch while a microbatch of given texts is computed, of whose tokens each is a response's.

        count: texts of all ranks in an update; length: the most tokens of one.
        """
        sequences = in_microbatch(-(-count // _groups(config, ranks)), length, config)
        return replace(self, sequences=sequences, length=length, responses=sequences * length)


def _groups(config: OnlineConfig, ranks: int) -> int:
    """The groups of ranks, each of which computes microbatches of its own."""
    return ranks // config.sequence_ranks


def rows_of(config: ResponseSettings, drawn: int) -> int:
    """Rows that the sampler decodes together if it is to draw so many responses; all of them where none are chosen."""
    rows = config.sampling.rows
    return bucket(drawn if rows == "auto" else min(rows, drawn))


def prompts_of(responses: int, samples: int) -> int:
    """The most prompts that consecutive responses belong to, `samples` to a prompt: the first may not be all there."""
    return min(responses, -(-(responses - 1) // samples) + 1)


def in_microbatch(sequences: int, length: int, config: ResponseSettings) -> int:
    """How many of a rank's sequences of one update share a microbatch, as `microbatch.pack_even` spreads them."""
    mine, fit = sequences or 1, max(config.microbatch_tokens // length, 1)
    return -(-mine // -(-mine // fit))

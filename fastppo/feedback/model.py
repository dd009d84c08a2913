"""Reward models as a source of reward, one or an ensemble."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.batch import Packed, pack
from fastppo.config import ZeroConfig
from fastppo.conversation import plain_tokens
from fastppo.engine import Frozen, even_passes
from fastppo.feedback.responses import Responses, RewardError, Source, checked
from fastppo.microbatch import IDLE, pack_alone
from fastppo.world import World, all_gather

log = logging.getLogger("fastppo")


class TooLong(RewardError):
    """A prompt and response that do not fit the model."""


class ModelSource:
    """A reward model. With the actor's tokenizer it reads the very tokens; with another, the text anew."""

    def __init__(
        self,
        model: Frozen,
        tokenizer: PreTrainedTokenizerBase,
        actors: PreTrainedTokenizerBase | None,
        *,
        budget: int,
        zero: ZeroConfig,
        world: World,
        name: str = "the reward model",
    ):
        """model: of a RewardModel; tokenizer: its own; actors: None where only text is at hand; budget: tokens of a
        forward pass; name: for errors."""
        self.model, self.tokenizer, self.budget, self.zero, self.world = model, tokenizer, budget, zero, world
        self.name = name
        self.same = actors is not None and tokenizer.get_vocab() == actors.get_vocab()
        self.rows: int = model.module.model.config.get_text_config().vocab_size
        self.context = getattr(model.module.model.config, "max_position_embeddings", None)
        if not self.same and tokenizer.eos_token_id is None:
            raise RewardError(f"{name}: its tokenizer has no EOS token, with which a response ends. Give it one.")
        if actors is not None and not self.same:
            log.info("%s has a tokenizer of its own: prompts and responses are tokenised anew for it", name)

    def __call__(self, responses: Responses) -> list[float]:
        packed = responses.packed if self.same else self.tokenised(responses.prompts, responses.texts, responses.ended)
        return self.scores(packed, responses.texts)

    def scores(self, packed: Packed, texts: Sequence[str]) -> list[float]:
        """One number for each sequence; texts: the responses, to name one in an error. All ranks call it."""
        longest = max(all_gather(int(packed.lengths.max()) if len(packed) else 0, self.world))
        if self.context is not None and longest > self.context:
            raise TooLong(
                f"a prompt and response of {longest} tokens do not fit {self.name}, which takes {self.context}"
            )
        highest = max(all_gather(int(packed.tokens.max()) if len(packed) else 0, self.world))
        if highest >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise RewardError(
                f"{self.name} has embeddings of {self.rows} tokens, and a text for it holds token {highest}"
                f" ({token!r}): its tokenizer was given more than the model. Resize its embeddings"
                " (model.resize_token_embeddings(len(tokenizer)), and save both), or use its own tokenizer."
            )
        scores = torch.zeros(len(packed))
        for part in even_passes(pack_alone(packed.lengths, self.budget), self.zero, self.world):
            piece = packed.select(part) if len(part) else IDLE
            scores[part] = self.model(piece.to(self.world.device)).cpu()[: len(part)]
        return checked(self.name, scores, texts)

    def tokenised(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> Packed:
        """Prompts and responses in the model's own tokens, the EOS behind those responses that ended.

        These are the tokens that it is given where it has the actor's tokenizer, but for what text does not tell:
        special tokens within a response; that it was written in other tokens than its text is split into, or cut
        within a character; that it ended with another token than this EOS; that a chat template leaves out the BOS
        which the tokenizer puts before a text.
        """
        starts = plain_tokens(prompts, self.tokenizer)
        texts = self.tokenizer(list(responses), add_special_tokens=False)["input_ids"] if responses else []
        eos, tokens = self.tokenizer.eos_token_id, []
        for start, text, has_ended in zip(starts, texts, ended, strict=True):
            tokens.append([*start, *text, eos] if has_ended else [*start, *text] or [eos])
        return pack(tokens, [1] * len(tokens))


def ensemble(members: Sequence[Source], combine: str) -> Source:
    """`mean` or `min` of what the members say of each response. Raises the first RewardError of a member.

    The minimum is the cautious choice: a response must please all members, and a flaw that one of them has cannot be
    exploited alone (Coste et al., 2023, "Reward model ensembles help mitigate overoptimization", worst-case
    optimisation).
    """

    def source(responses: Responses) -> list[float]:
        answers: list[Sequence[float]] = []
        failed: list[RewardError] = []
        for member in members:  # all of them, whatever one says: their collectives need every rank
            try:
                answers.append(member(responses))
            except RewardError as error:
                failed.append(error)
        if failed:
            raise failed[0]
        said = torch.tensor(answers, dtype=torch.float64)  # (members, B)
        together = said.amin(0) if combine == "min" else said.mean(0)
        numbers: list[float] = together.tolist()
        return numbers

    return source

"""Reward models as a source of reward, one or an ensemble."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastppo.config import ZeroConfig
from fastppo.data import (
    IDLE,
    NO_ARGUMENTS,
    DataError,
    Messages,
    Packed,
    encode_after,
    pack,
    pack_alone,
    plain_tokens,
    template_tokens,
)
from fastppo.distributed import Frozen, World, all_gather, even_passes
from fastppo.models import context_of
from fastppo.rewards.responses import Responses, RewardError, Source, checked

log = logging.getLogger("fastppo")


class TooLong(RewardError):
    """A prompt and response that do not fit the model."""


class BadChat(RewardError):
    """A chat that the model's template refuses."""


class ModelSource:
    """A reward model, given what it was made to read.

    A chat, where its tokenizer has a template, whole and as that writes it. Else with the actor's tokenizer the very
    tokens, and with another the text anew.
    """

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
        template: Mapping[str, Any] = NO_ARGUMENTS,
    ):
        """model: of a RewardModel; tokenizer: its own; actors: None where only text is at hand; budget: tokens of a
        forward pass; name: for errors; template: arguments of its chat template."""
        self.model, self.tokenizer, self.budget, self.zero, self.world = model, tokenizer, budget, zero, world
        self.name, self.template = name, template
        self.same = actors is not None and tokenizer.get_vocab() == actors.get_vocab()
        self.context = context_of(model.module.model.config)
        self.rows: int = model.module.model.config.get_text_config().vocab_size
        if not self.same and tokenizer.eos_token_id is None:
            raise RewardError(f"{name}: its tokenizer has no EOS token, with which a response ends. Give it one.")
        if actors is not None and not self.same:
            log.info("%s has a tokenizer of its own: prompts and responses are tokenised anew for it", name)
        if actors is not None:
            template_of = "the actor's" if tokenizer.chat_template is None else "its own"
            log.info("%s reads prompts that are chat by %s template", name, template_of)

    def __call__(self, responses: Responses) -> list[float]:
        if self.same and not self._chats(responses.messages):
            return self.scores(responses.packed, responses.texts)
        own = [part.tolist() for part in responses.packed.tokens.split(responses.packed.lengths.tolist())]
        packed = self.tokenised(
            responses.prompts, responses.texts, responses.ended, responses.messages, own if self.same else None
        )
        return self.scores(packed, responses.texts)

    def scores(self, packed: Packed, texts: Sequence[str]) -> list[float]:
        """One number for each sequence; texts: the responses, to name one in an error. All ranks call it."""
        self.check(packed)
        scores = torch.zeros(len(packed))
        for part in even_passes(pack_alone(packed.lengths, self.budget), self.zero, self.world):
            piece = packed.select(part) if len(part) else IDLE
            scores[part] = self.model(piece.to(self.world.device)).cpu()[: len(part)]
        return checked(self.name, scores, texts)

    def check(self, packed: Packed) -> None:
        """Raises TooLong, or RewardError for a token that the model has no embedding of. All ranks call it."""
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

    def tokenised(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        ended: Sequence[bool],
        messages: Sequence[Messages | None] | None = None,
        own: Sequence[list[int]] | None = None,
    ) -> Packed:
        """Prompts and responses in the model's own tokens. messages: of prompts that are chat; own: where it reads the
        very tokens, those.

        A chat with its response is what the model's template writes. Else it is the two texts, with the EOS behind
        those responses that ended. These are the tokens that it is given where it has the actor's tokenizer, but for
        what text does not tell: special tokens within a response; that it was written in other tokens than its text is
        split into, or cut within a character; that it ended with another token than this EOS; that a chat template
        leaves out the BOS which the tokenizer puts before a text.
        """
        rows = list(own) if own is not None else self._texts(prompts, responses, ended)
        for i in self._chats(messages):
            assert messages is not None
            rows[i] = chat_tokens(self.name, messages[i] or [], responses[i], self.tokenizer, self.template)
        return pack(rows, [1] * len(rows))

    def _texts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        starts = plain_tokens(prompts, self.tokenizer)
        texts = encode_after(prompts, starts, responses, self.tokenizer)
        eos, rows = self.tokenizer.eos_token_id, []
        for start, text, has_ended in zip(starts, texts, ended, strict=True):
            rows.append([*start, *text, eos] if has_ended else [*start, *text] or [eos])
        return rows

    def _chats(self, messages: Sequence[Messages | None] | None) -> list[int]:
        """Which prompts are chat that the model's own template can write."""
        if messages is None or self.tokenizer.chat_template is None:
            return []
        return [i for i, chat in enumerate(messages) if chat is not None]


def chat_tokens(
    name: str, asked: Messages, response: str, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]
) -> list[int]:
    """A chat with its response, whole as a classifier's users give it: every template closes it its own way.

    Spaces around a response are the actor's template's, and no part of what was said. name: of the model, for errors;
    template: arguments. Raises BadChat.
    """
    chat = [*asked, {"role": "assistant", "content": response.strip()}]
    try:
        tokens = template_tokens(chat, f"{name}: a prompt", tokenizer, to_be_answered=False, arguments=template)
    except DataError as error:
        raise BadChat(f"{error}. Its roles are {', '.join(message['role'] for message in chat)}.") from error
    return list(tokens) or [tokenizer.eos_token_id]


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

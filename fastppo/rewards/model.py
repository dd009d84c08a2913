"""Reward models, single or as an ensemble, as sources of reward."""

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
    of_group,
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
    """A prompt and response exceed the context length of the model."""


class BadChat(RewardError):
    """The model's chat template rejects a chat."""


class ModelSource:
    """A reward model that scores prompts and responses in its own format.

    A chat is formatted by the chat template of the model's tokenizer, if it has one. Otherwise the model gets the
    actor's tokens, if the tokenizers are the same, or the text tokenised by its tokenizer.
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
        """model: a frozen RewardModel; tokenizer: of the reward model; actors: the actor's tokenizer, None if there are
        only texts; budget: maximum tokens of a forward pass; name: for errors; template: arguments of the chat
        template."""
        self.model, self.tokenizer, self.budget, self.zero, self.world = model, tokenizer, budget, zero, world
        self.name, self.template = name, template
        self.same = actors is not None and tokenizer.get_vocab() == actors.get_vocab()
        self.context = context_of(model.module.model.config)
        self.rows: int = model.module.model.config.get_text_config().vocab_size
        if not self.same and tokenizer.eos_token_id is None:
            raise RewardError(f"{name}: its tokenizer has no EOS token, with which a response ends. Define one.")
        if actors is not None and not self.same:
            log.info("%s has another tokenizer than the actor: prompts and responses are tokenised again for it", name)
        if actors is not None:
            owner = "the actor's" if tokenizer.chat_template is None else "its own"
            log.info("%s gets chat prompts formatted by %s template", name, owner)

    def __call__(self, responses: Responses) -> list[float]:
        if self.same and not self._chats(responses.messages):
            return self.scores(responses.packed, responses.texts)
        actor_tokens = [part.tolist() for part in responses.packed.tokens.split(responses.packed.lengths.tolist())]
        packed = self.tokenised(
            responses.prompts,
            responses.texts,
            responses.ended,
            responses.messages,
            actor_tokens if self.same else None,
            responses.conversations,
        )
        return self.scores(packed, responses.texts)

    def scores(self, packed: Packed, texts: Sequence[str]) -> list[float]:
        """One number for each sequence; texts: the responses, to name one in an error. All ranks call it."""
        self.check(packed)
        packed, own = of_group(packed, self.world.sequence)
        scores, parts = torch.zeros(len(packed)), []
        for part in even_passes(pack_alone(packed.lengths, self.budget), self.zero, self.world):
            piece = packed.select(part) if len(part) else IDLE
            parts.append((part, self.model(piece.to(self.world.device))[: len(part)]))
        for part, found in parts:  # after the last pass: the host waits for the device once
            scores[part] = found.cpu()
        return checked(self.name, scores[own], texts)

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
        actor_tokens: Sequence[list[int]] | None = None,
        conversations: Sequence[Messages] | None = None,
    ) -> Packed:
        """Prompts and responses as tokens of the model. messages: the chat of each prompt, None for one that is not a
        chat; actor_tokens: the actor's tokens of each sequence, if the tokenizers are the same; conversations: with an
        environment, each with its prompt: they are read in place of the responses.

        A chat with its response is formatted by the model's template. Otherwise the two texts are tokenised, with the
        EOS after a response that is not truncated. The result equals the actor's tokens, if the tokenizers are the
        same, except for what a text does not show: special tokens within a response; a response sampled in other tokens
        than the tokenizer would use, or truncated within a character; another end token than the EOS; and the BOS,
        which the tokenizer adds to a text and a chat template may leave out.
        """
        behind = responses if conversations is None else [_said_behind(messages) for messages in conversations]
        rows = list(actor_tokens) if actor_tokens is not None else self._texts(prompts, behind, ended)
        for i in self._chats(messages):
            assert messages is not None
            asked = messages[i] or []
            answer = [{"role": "assistant", "content": responses[i]}]
            if conversations is not None:
                answer = conversations[i][len(asked) :]
            rows[i] = chat_tokens(self.name, asked, answer, self.tokenizer, self.template)
        return pack(rows, [1] * len(rows))

    def _texts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[list[int]]:
        starts = plain_tokens(prompts, self.tokenizer)
        texts = encode_after(prompts, starts, responses, self.tokenizer)
        eos, rows = self.tokenizer.eos_token_id, []
        for start, text, has_ended in zip(starts, texts, ended, strict=True):
            rows.append([*start, *text, eos] if has_ended else [*start, *text] or [eos])
        return rows

    def _chats(self, messages: Sequence[Messages | None] | None) -> list[int]:
        """Indices of the prompts that are chats to be formatted by the model's template; none if it has no template."""
        if messages is None or self.tokenizer.chat_template is None:
            return []
        return [i for i, chat in enumerate(messages) if chat is not None]


def _said_behind(conversation: Messages) -> str:
    """All that was said after the prompt in a conversation of plain text."""
    return "".join(message.get("content") or "" for message in conversation[1:])


def chat_tokens(
    name: str, asked: Messages, answer: Messages, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any]
) -> list[int]:
    """The tokens of a chat and its answer, complete to the end of the template, as a classifier reads it.

    Spaces around what the assistant says in the answer are removed: they come from the actor's template. asked: the
    messages before the answer; answer: one message of the assistant, with an environment also observations and further
    turns; name: of the model, for errors; template: arguments of the template. Raises BadChat.
    """
    chat = [*asked, *(_without_spaces(message) for message in answer)]
    one_by_one = [part for message in chat for part in _one_call_each(message)]
    error: DataError | None = None
    # Llama-3.1's template refuses a turn of several calls, which its model may write all the same.
    for messages in (chat, one_by_one) if len(one_by_one) > len(chat) else (chat,):
        try:
            tokens = template_tokens(messages, f"{name}: a prompt", tokenizer, to_be_answered=False, arguments=template)
            return list(tokens) or [tokenizer.eos_token_id]
        except DataError as refused:
            error = refused
    raise BadChat(f"{error}. Its roles are {', '.join(message['role'] for message in chat)}.") from error


def _one_call_each(message: dict[str, Any]) -> Messages:
    """A turn of several tool calls as several turns; any other message alone."""
    calls = message.get("tool_calls") or []
    if len(calls) < 2:
        return [message]
    first = message | {"tool_calls": calls[:1]}
    return [first, *({"role": message["role"], "content": "", "tool_calls": [call]} for call in calls[1:])]


def _without_spaces(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return message | {"content": content.strip()} if message["role"] == "assistant" and content else message


class Ensemble:
    """Reward models as one source, the `mean` or `min` of their scores. It raises the first RewardError of a member.

    The minimum is conservative: it is high only if all members give a high score, so that the flaw of a single member
    cannot be exploited (Coste et al., 2023, "Reward model ensembles help mitigate overoptimization", worst-case
    optimisation).
    """

    def __init__(self, members: Sequence[Source], combine: str):
        self._members, self._combine = members, combine

    def __call__(self, responses: Responses) -> list[float]:
        answers: list[Sequence[float]] = []
        errors: list[RewardError] = []
        for member in self._members:  # call all of them even after an error: their collectives need every rank
            try:
                answers.append(member(responses))
            except RewardError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        by_member = torch.tensor(answers, dtype=torch.float64)  # (members, B)
        scores: list[float] = (by_member.amin(0) if self._combine == "min" else by_member.mean(0)).tolist()
        return scores

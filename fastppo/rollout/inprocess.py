"""Sampling in the trainer's own process: packed prefill, decode at each row's own length, rows refilled as they end.

A response depends on the seed, its prompt's stream and the model, and on nothing else: its random numbers come from
a counter-based generator, it attends to its own row of the cache alone, and the number of rows in a batch is one of
a few fixed sizes, never below four, because matrix products of one to three rows take another path and round
differently. So do those of up to eleven rows on some numbers of threads, if they are not four or eight: a prefill is of
sixteen tokens or more. In a mixture of experts it depends on the other rows by rounding, as the products of its experts
have rows of all responses.

In a conversation with an environment a row keeps its place while the environment answers, and the others are decoded
meanwhile. The row's cache is then extended by the observation, and the next turn begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch

from fastppo.config import ResponseSettings, SamplingConfig
from fastppo.data import Prompts, Rollout, pack
from fastppo.distributed import World
from fastppo.environments import Conversations, Environment, load_environment
from fastppo.models import Policy, SampledModel, SamplingWeights, attention, joined_projections
from fastppo.rollout.decoder import Decoder
from fastppo.rollout.decoding import Decoding, Response, space
from fastppo.rollout.turns import Conversing


class InProcess:
    """The reference of all engines: the actor's own module, or at ZeRO stage 3 a copy of it.

    Where decode steps are recorded, the cache and the graphs are kept from batch to batch. As a `Sleeper` it frees the
    cache meanwhile; if the allocator then gives it another place, steps are recorded anew.
    """

    def __init__(
        self,
        weights: SamplingWeights,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        longest: int | None = None,
        environment: Environment | None = None,
    ):
        """longest: the most tokens of a prompt and its response, if known; environment: answers each turn."""
        self._weights, self._sampling, self._stop_ids, self._longest = weights, sampling, stop_ids, longest
        self._environment = environment
        self._policy: Policy | None = None
        self._decoder: Decoder | None = None

    def sync(self) -> None:
        self._policy = self._weights.gather()

    def sample(self, prompts: Prompts, *, temperature: float, seed: int) -> Rollout:
        assert self._policy is not None, "sync() comes first"
        sampling = replace(self._sampling, temperature=temperature)
        if not records(self._policy, sampling):
            self._decoder = None
        elif len(prompts):
            self._decoder = self._serving(self._policy, prompts)
        return sample(
            self._policy,
            prompts,
            sampling,
            stop_ids=self._stop_ids,
            seed=seed,
            decoder=self._decoder,
            environment=self._environment,
        )

    def sleep(self) -> None:
        if self._decoder is not None:
            self._decoder.cache.free()

    def wake(self) -> None:
        if self._decoder is not None:
            self._decoder.cache.restore()

    def _serving(self, policy: Policy, prompts: Prompts) -> Decoder:
        """The decoder of the last batch, or a larger one."""
        rows, length = space(prompts, self._sampling)
        if (kept := self._decoder) is not None:
            if kept.policy is policy and kept.rows >= rows and kept.length >= length:
                return kept
            rows, length = max(rows, kept.rows), max(length, kept.length)
        self._decoder = kept = None  # its memory is free before the next takes its own
        length = max(length, min(roomy(length), self._longest or roomy(length)))
        return Decoder(policy, rows, length, self._sampling, self._stop_ids, recorded=True)


def make_inprocess(config: ResponseSettings, roles: SampledModel, stop_ids: Sequence[int], world: World) -> InProcess:
    longest = (config.data.first_tokens or config.data.max_prompt_tokens) + config.sampling.max_new_tokens
    environment = load_environment(config, roles.tokenizer)
    return InProcess(roles.sampling_weights, config.sampling, stop_ids, longest, environment)


def sample(
    policy: Policy,
    prompts: Prompts,
    config: SamplingConfig,
    *,
    stop_ids: Sequence[int],
    seed: int,
    decoder: Decoder | None = None,
    environment: Environment | None = None,
) -> Rollout:
    """One response of 1 to `max_new_tokens` tokens to each prompt, the stop token included; on the CPU.

    Those that `prompts` has begun go on, and with its `extend_by` some may be left incomplete.
    decoder: of this policy and these stop ids, with space for the prompts; one is made where there is none.
    environment: answers each turn of a response, whose tokens then include the observations. To be called within
    `stop.together`: ranks do not wait for each other in here, and one may leave alone.
    """
    was_training = policy.training
    policy.eval()
    with ExitStack() as stack:
        talks = None
        if environment is not None:
            talks = stack.enter_context(closing(Conversations(prompts, environment, config, stop_ids, seed=seed)))
        responses: list[Response] = []
        if len(prompts):
            stack.enter_context(torch.no_grad())
            stack.enter_context(joined_projections(policy))
            if decoder is None:
                decoder = Decoder(policy, *space(prompts, config), config, stop_ids, recorded=records(policy, config))
            if talks is None:
                responses = Decoding(decoder, prompts, config, seed).run()
            else:
                Conversing(decoder, prompts, config, seed, talks).run()
        rollout = packed_responses(prompts, responses, config) if talks is None else talks.rollout()
    policy.train(was_training)
    return rollout


def packed_responses(prompts: Prompts, responses: Sequence[Response], config: SamplingConfig) -> Rollout:
    """The rollout of a response of one turn to each prompt."""
    sequences = [(*p, *r[0]) for p, r in zip(prompts.tokens_so_far, responses, strict=True)]
    packed = pack(sequences, [len(whole) - len(p) for whole, p in zip(sequences, prompts.tokens, strict=True)])
    before = [[] if begun is None else begun.logprobs.tolist() for begun in prompts.begun or [None] * len(prompts)]
    logprobs = [x for old, r in zip(before, responses, strict=True) for x in (*old, *r[1])]
    ended = torch.tensor([r[2] for r in responses], dtype=torch.bool)
    complete = None if prompts.extend_by is None else ended | (packed.response_lengths == config.max_new_tokens)
    of_tokens = torch.tensor(logprobs, dtype=torch.float32)
    return Rollout(packed, of_tokens, ended, prompts.sources, complete=complete)


def records(policy: Policy, config: SamplingConfig) -> bool:
    """Whether decode steps are recorded."""
    return config.cuda_graphs and attention.decodes_without_sync(policy.model)


def roomy(length: int) -> int:
    """At least so many positions, and at most a quarter more: a cache that is kept should seldom have to grow."""
    step = 1 << max(length.bit_length() - 3, 4)
    return -(-length // step) * step

"""Sampling by vLLM, in the process of each rank: the actor's weights are sent to it whenever they have changed.

`tensor_parallel_size` neighbouring ranks hold one copy of the model and draw together what all of them are asked for.
vLLM is then in each of these processes and expects the same requests in the same order.

A response depends on its prompt, on the weights, and on random numbers that are those of seed and stream alone. But
vLLM computes the tokens of many responses in one product, and their number changes its rounding; so a response is the
same bit for bit where all that is asked for with it is the same.

In a conversation with an environment a turn is a response of its own, to all that was said before it. When the answers
come then decides what is computed together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from fastppo.config import ResponseSettings, SamplingConfig
from fastppo.data import Prompts, Rollout
from fastppo.distributed import Neighbours, World, neighbours_of
from fastppo.environments import Conversations, Environment, load_environment
from fastppo.models import SampledModel, SamplingWeights
from fastppo.rollout.answers import SamplerError
from fastppo.rollout.inprocess import packed_responses
from fastppo.rollout.vllm.check import import_vllm
from fastppo.rollout.vllm.drawing import Drawing, Order, Request
from fastppo.rollout.vllm.refusals import WAY, explained
from fastppo.rollout.vllm.start import start_vllm
from fastppo.rollout.vllm.turns import Conversing


class Vllm:
    """vLLM as a rollout engine. A `Sleeper`: on a GPU its memory is another phase's while nothing is sampled.

    The order is: `wake` takes memory for the weights, `sync` fills it and then takes memory for the key/value cache, so
    that the cache is not there while weights are gathered; `sleep` gives both up.
    """

    def __init__(
        self,
        vllm: Any,
        llm: Any,
        weights: SamplingWeights,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        together: Neighbours,
        environment: Environment | None = None,
    ):
        """llm: a `vllm.LLM` from `start_vllm`; together: the ranks that hold one copy of the model; environment:
        answers each turn."""
        self._vllm, self._llm, self._weights, self._sampling = vllm, llm, weights, sampling
        self._stop_ids, self._together, self._environment = stop_ids, together, environment
        self._cache_asleep = False

    def sync(self) -> None:
        with explained(self._vllm.__version__, "does not take the actor's weights"):
            missing = sorted(set().union(*self._llm.collective_rpc(load, args=(self._weights.stream(),))))
        if missing:
            names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise SamplerError(
                f"vLLM {self._vllm.__version__} has weights that the actor does not have: {names}. {WAY}"
            )
        if self._cache_asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._cache_asleep = False

    def sample(self, prompts: Prompts, *, temperature: float, seed: int) -> Rollout:
        sampling, environment = replace(self._sampling, temperature=temperature), self._environment
        if environment is None:
            order, own = self._order(prompts, [sampling.max_new_tokens] * len(prompts), sampling, seed)
            responses = Drawing(self._vllm, self._llm, order).run()
            return packed_responses(prompts, responses[own.start : own.stop], sampling)
        with closing(Conversations(prompts, environment, sampling, self._stop_ids, seed=seed)) as talks:
            order, own = self._order(prompts, [talks.limit(i) for i in range(len(prompts))], sampling, seed)
            Conversing(self._vllm, self._llm, order, talks, own).run()
            return talks.rollout()

    def _order(
        self, prompts: Prompts, limits: Sequence[int], sampling: SamplingConfig, seed: int
    ) -> tuple[Order, range]:
        """What is drawn together with these prompts, and which of its requests are theirs."""
        wanted = list(map(Request, prompts.tokens, prompts.streams.tolist(), limits))
        of_ranks = self._together.gather(wanted)  # neighbours may have other numbers of prompts, or none
        first = sum(map(len, of_ranks[: self._together.index]))
        requests = [request for of_rank in of_ranks for request in of_rank]
        return Order(requests, sampling, self._stop_ids, seed, self._together), range(first, first + len(prompts))

    def sleep(self) -> None:
        self._llm.sleep(level=2)
        self._cache_asleep = True

    def wake(self) -> None:
        torch.cuda.empty_cache()  # what other parts have given up is PyTorch's until then, and vLLM's is beside it
        self._llm.wake_up(tags=["weights"])


def make_vllm(config: ResponseSettings, roles: SampledModel, stop_ids: Sequence[int], world: World) -> Vllm:
    vllm = import_vllm()
    together = neighbours_of(world, config.rollout.vllm.tensor_parallel_size, config.timeout)
    environment = load_environment(config, roles.tokenizer)
    llm = start_vllm(vllm, config, roles.policy, world)
    return Vllm(vllm, llm, roles.sampling_weights, config.sampling, stop_ids, together, environment)


def load(worker: Any, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
    """In vLLM's worker: read weights as from a checkpoint; returns its parameters that none of them was read into.

    vLLM reads a checkpoint that lacks some and says so in its log only.
    """
    model: Any = worker.get_model()
    read, names = model.load_weights, {name for name, _ in model.named_parameters()}
    unread: set[str] = set()

    def noting(weights: Iterator[tuple[str, Tensor]]) -> Any:
        loaded = read(weights)
        unread.update(names - (names if loaded is None else loaded))  # some models do not say
        return loaded

    model.load_weights = noting
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    if next(model.parameters()).is_cpu:
        _pack_again(model)
    return unread


def _pack_again(model: Any) -> None:
    """On the CPU vLLM computes with packed copies of weights; those of a tied head and of experts only once."""
    seen: set[int] = set()
    for layer in model.modules():
        weight, method = layer._parameters.get("weight"), cast(Any, getattr(layer, "quant_method", None))
        if weight is not None and id(weight) in seen and hasattr(layer, "cpu_linear"):
            method.process_weights_after_loading(layer)
        seen.add(id(weight))
        if getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)

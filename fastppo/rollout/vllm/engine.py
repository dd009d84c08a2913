"""Sampling by vLLM, in the process of each rank: the actor's weights are sent to it whenever they have changed.

`tensor_parallel_size` neighbouring ranks hold one copy of the model and draw together what all of them are asked for.
vLLM is then in each of these processes and expects the same requests in the same order.

A response depends on its prompt, on the weights, and on random numbers that are those of seed and stream alone. But
vLLM computes the tokens of many responses in one product, and their number changes its rounding; so a response is the
same bit for bit where all that is asked for with it is the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from fastppo.config import ResponseSettings, SamplingConfig
from fastppo.data import Prompts, Rollout, pack
from fastppo.distributed import Neighbours, Stopped, World, neighbours_of, stop
from fastppo.errors import FastPPOError
from fastppo.models import SampledModel, SamplingWeights
from fastppo.rollout.answers import SamplerError
from fastppo.rollout.vllm.check import import_vllm
from fastppo.rollout.vllm.start import REFUSALS, is_of_another_rank, start_vllm

Request = tuple[tuple[int, ...], int]  # a prompt and its stream

STEPS = 8  # tokens of each response between two times that ranks that sample together agree whether to stop


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
    ):
        """llm: a `vllm.LLM` from `start_vllm`; together: the ranks that hold one copy of the model."""
        self._vllm, self._llm, self._weights, self._sampling = vllm, llm, weights, sampling
        self._stop_ids, self._together = sorted(set(stop_ids)), together
        self._cache_asleep = False

    def sync(self) -> None:
        with self._explained("does not take the actor's weights"):
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
        of_rank = list(zip(prompts.tokens, prompts.streams.tolist(), strict=True))
        asked = self._together.gather(of_rank)  # neighbours may have other numbers of prompts, or none
        drawn = self._draw([request for requests in asked for request in requests], temperature, seed)
        first = sum(map(len, asked[: self._together.index]))
        own = drawn[first : first + len(prompts)]
        responses = [list(output.token_ids) for output in own]
        packed = pack(
            [(*prompt, *response) for prompt, response in zip(prompts.tokens, responses, strict=True)],
            list(map(len, responses)),
        )
        logprobs = torch.tensor([x for output in own for x in output.logprobs.logprobs], dtype=torch.float32)
        ended = torch.tensor([response[-1] in self._stop_ids for response in responses], dtype=torch.bool)
        return Rollout(packed, logprobs, ended, prompts.sources)

    def _draw(self, requests: Sequence[Request], temperature: float, seed: int) -> list[Any]:
        """vLLM's output for each request, in their order. Raises Stopped."""
        engine = self._llm.llm_engine
        outputs: dict[int, Any] = {}  # of each request that is complete
        with self._explained("does not take the prompts"):
            self._llm.reset_prefix_cache()  # what was computed before would change how this is computed
            for i, (tokens, stream) in enumerate(requests):
                engine.add_request(f"{i}", {"prompt_token_ids": list(tokens)}, self._params(temperature, seed, stream))
        step = 0
        while engine.has_unfinished_requests():
            try:
                self._check_stop(step)
            except Stopped:
                engine.abort_request([f"{i}" for i in range(len(requests)) if i not in outputs])
                raise
            with self._explained("cannot compute this model's responses"):
                outputs |= {int(done.request_id): done.outputs[0] for done in engine.step() if done.finished}
            step += 1
        return [outputs[i] for i in range(len(requests))]

    @contextmanager
    def _explained(self, refusal: str) -> Iterator[None]:
        """Within this context vLLM computes; what it raises becomes a SamplerError that says what it refused to do."""
        try:
            yield
        except (FastPPOError, torch.OutOfMemoryError):  # the end of a run explains the latter
            raise
        except REFUSALS as error:
            if is_of_another_rank(error):
                raise
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            raise SamplerError(f"vLLM {self._vllm.__version__} {refusal}: {said}. {WAY}") from error

    def _check_stop(self, step: int) -> None:
        if self._together.size == 1:
            stop.check_alone()
        elif step % STEPS == 0:
            stop.check_among(self._together)

    def _params(self, temperature: float, seed: int, stream: int) -> Any:
        sampling = self._sampling
        return self._vllm.SamplingParams(
            temperature=temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            min_tokens=sampling.min_new_tokens,
            stop_token_ids=self._stop_ids,  # one that ends a response is part of it
            ignore_eos=True,  # the EOS tokens are among these, unless they shall not end a response
            seed=request_seed(seed, stream),
            logprobs=0,  # that of the token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.FINAL_ONLY,
        )

    def sleep(self) -> None:
        self._llm.sleep(level=2)
        self._cache_asleep = True

    def wake(self) -> None:
        torch.cuda.empty_cache()  # what other parts have given up is PyTorch's until then, and vLLM's is beside it
        self._llm.wake_up(tags=["weights"])


WAY = "Set rollout.engine to inprocess for this model."


def make_vllm(config: ResponseSettings, roles: SampledModel, stop_ids: Sequence[int], world: World) -> Vllm:
    vllm = import_vllm()
    together = neighbours_of(world, config.rollout.vllm.tensor_parallel_size, config.timeout)
    llm = start_vllm(vllm, config, roles.policy, world)
    return Vllm(vllm, llm, roles.sampling_weights, config.sampling, stop_ids, together)


def request_seed(seed: int, stream: int) -> int:
    """The seed of one response, in [0, 2^63): of a run's or an evaluation's seed and the response's stream."""
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


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

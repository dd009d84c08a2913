"""vLLM as this project calls it, without vLLM: the same names and effects, drawn by transformers' own module.

It disturbs its process as vLLM does, notes in `events` what is asked of it, and takes weights as from a checkpoint.
"""

from __future__ import annotations

import os
import random
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fastppo.ops.eager import restrict


@dataclass
class SamplingParams:
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    min_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    seed: int
    logprobs: int
    flat_logprobs: bool
    detokenize: bool
    output_kind: str


@dataclass
class EngineArgs:
    model: str = ""
    seed: int = 0
    max_num_seqs: int = 256
    kv_cache_memory_bytes: int | None = None


@dataclass
class _Running:
    tokens: list[int]
    params: SamplingParams
    generator: torch.Generator
    drawn: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class _Engine:
    """Draws a token for each response at a time."""

    def __init__(self, model: nn.Module, events: list[Any]):
        self._model, self._events = model, events
        self.running: dict[str, _Running] = {}
        self.asked: list[tuple[str, tuple[int, ...], int, int]] = []  # name, prompt, seed and most tokens
        self.engine_core = SimpleNamespace()

    def add_request(self, request_id: str, prompt: dict[str, list[int]], params: SamplingParams) -> str:
        assert isinstance(params, SamplingParams) and isinstance(request_id, str) and request_id not in self.running
        self._events.append(("request", tuple(prompt["prompt_token_ids"]), params))
        self.asked.append((request_id, tuple(prompt["prompt_token_ids"]), params.seed, params.max_tokens))
        generator = torch.Generator().manual_seed(params.seed)
        self.running[request_id] = _Running(list(prompt["prompt_token_ids"]), params, generator)
        return request_id

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    @torch.no_grad()
    def step(self) -> list[Any]:
        done = []
        for name, one in list(self.running.items()):
            params, tokens = one.params, torch.tensor([one.tokens + one.drawn])
            logits = self._model(tokens, use_cache=False).logits[0, -1:].float()
            if len(one.drawn) < params.min_tokens:
                logits[:, params.stop_token_ids] = float("-inf")
            kept = restrict(logits, params.temperature, params.top_k, params.top_p) / params.temperature
            token = int(torch.multinomial(kept.softmax(-1), 1, generator=one.generator))
            one.drawn.append(token)
            one.logprobs.append(float(kept.log_softmax(-1)[0, token]))
            if token in params.stop_token_ids or len(one.drawn) == params.max_tokens:
                output = SimpleNamespace(token_ids=one.drawn, logprobs=SimpleNamespace(logprobs=one.logprobs))
                done.append(SimpleNamespace(request_id=name, finished=True, outputs=[output]))
                del self.running[name]
        return done[::-1]  # in no order that could be relied on

    def abort_request(self, request_ids: list[str]) -> None:
        self._events.append(("abort", len(request_ids)))
        for name in request_ids:
            del self.running[name]


class _Worker:
    def __init__(self, model: nn.Module):
        self._model = model

    def get_model(self) -> nn.Module:
        return self._model

    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self._model.load_weights(weights_iterator)


def _with_loader(model: nn.Module) -> nn.Module:
    """Give the module vLLM's way to read a checkpoint."""

    class Loading(type(model)):  # type: ignore[misc]
        @torch.no_grad()
        def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
            parameters, loaded = dict(self.named_parameters()), set()
            for name, weight in weights:
                if name not in parameters:
                    raise ValueError(f"There is no module or parameter named {name!r}")
                assert parameters[name].shape == weight.shape, f"{name} of {tuple(weight.shape)}"
                parameters[name].copy_(weight)
                loaded.add(name)
            return loaded

    model.__class__ = Loading
    return model


class StandIn(ModuleType):
    """The module `vllm`."""

    def __init__(self, cache: Path, version: str = "0.32.1"):
        super().__init__("vllm")
        self.__version__ = version
        self.events: list[Any] = []
        self.arguments: dict[str, Any] = {}  # of the last engine
        self.refuses: BaseException | None = None  # raised in place of an engine
        self.SamplingParams, self.EngineArgs = SamplingParams, EngineArgs
        self.envs = SimpleNamespace(VLLM_CACHE_ROOT=str(cache))
        self.sampling_params = SimpleNamespace(RequestOutputKind=SimpleNamespace(FINAL_ONLY="final"))
        own = SimpleNamespace(module_name="vllm.model_executor.models.llama")
        of_transformers = SimpleNamespace(module_name="vllm.model_executor.models.transformers")
        models = {"LlamaForCausalLM": own, "GPTNeoXForCausalLM": of_transformers}
        self.ModelRegistry = SimpleNamespace(models=models)
        vllm = self

        class LLM:
            def __init__(self, model: str, *, tensor_parallel_size: int = 1, enforce_eager: bool = False, **more: Any):
                arguments = {"model": model, "tensor_parallel_size": tensor_parallel_size}
                vllm.arguments = arguments | {"enforce_eager": enforce_eager} | more
                assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
                random.seed(0)
                torch.manual_seed(0)
                torch.set_num_threads(1)
                torch.set_num_threads = lambda n: None
                os.environ.update(LD_PRELOAD="libtcmalloc.so", LOCAL_WORLD_SIZE="1", VLLM_OF_ITS_OWN="1")
                if vllm.refuses is not None:
                    raise vllm.refuses
                config = AutoConfig.from_pretrained(model)
                assert config.architectures == ["LlamaForCausalLM"]
                made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, more["dtype"]))
                self._model = _with_loader(made.eval())
                self.llm_engine = _Engine(self._model, vllm.events)
                end = weakref.finalize(self.llm_engine, vllm.events.append, "all groups of ranks end")
                self.llm_engine.engine_core._finalizer = end

            def collective_rpc(self, method: Any, args: tuple[Any, ...] = ()) -> list[Any]:
                vllm.events.append("load")
                return [method(_Worker(self._model), *args)]

            def reset_prefix_cache(self) -> None:
                vllm.events.append("reset")

            def sleep(self, level: int) -> None:
                vllm.events.append(("sleep", level))
                for parameter in self._model.parameters():
                    parameter.data.fill_(float("nan"))

            def wake_up(self, tags: list[str]) -> None:
                vllm.events.append(("wake", *tags))

        self.LLM = LLM


def install(monkeypatch: Any, cache: Path, **options: Any) -> StandIn:
    """Let `import vllm` find it."""
    vllm = StandIn(cache, **options)
    communicator = ModuleType("vllm.distributed.device_communicators.cpu_communicator")
    communicator._CPUSHMDistributed = type("_CPUSHMDistributed", (), {"make_group_name": staticmethod(str)})
    modules = {"vllm": vllm, communicator.__name__: communicator}
    for name in ("vllm.distributed", "vllm.distributed.device_communicators"):
        modules[name] = ModuleType(name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return vllm

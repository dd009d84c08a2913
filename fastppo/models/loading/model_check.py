"""The check that packed rows, train mode and decoding give the outputs of the model's own forward pass.

A model that needs more than causal attention over its own sequence (ALiBi, a recurrent state, attention outside
transformers' registry) would train wrongly without an error; here it raises one, which names the first wrong layer.
The result depends on the code and not on the weights, so the check uses a small random model of the same config, in
fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastppo.data import Packed, pack, segment_offsets
from fastppo.errors import FastPPOError
from fastppo.models.attention import ATTENTION, backend_in_use, without_backend
from fastppo.models.cache import Cache
from fastppo.models.frozen_prefix import layers_of
from fastppo.models.layers.fuse import layers_are_fused, layers_as
from fastppo.models.loading.demands import WORKS, check_demands, check_interface
from fastppo.models.loading.miniature import MINIATURE_ERRORS, miniature
from fastppo.models.loading.model_code import place_of, summary_of
from fastppo.models.parallel.group import computing_alone
from fastppo.models.roles import Backbone, ModelError, Policy, fuse_head
from fastppo.models.rotary import longrope_switch

log = logging.getLogger("fastppo")

# Mean difference from the model's own outputs, over their standard deviation. In fp32 it is about 1e-6 for correct
# models (1e-4 for Gemma-3n, whose thresholds amplify rounding) and 1e-2 or more for wrong ones.
TOLERANCE, TOLERANCE_BF16 = 1e-3, 1e-1
STEPS = 6  # decode steps
LONGEST, BEYOND = 64, 6  # tokens of the longest sequence in the check, and by how many it exceeds a window

_passed: set[tuple[str, str, str]] = set()  # arguments with which `check_architecture` has passed in this process


def check_architecture(
    auto: Any, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> None:
    """Check a small model of this config. Raises ModelError with the reason if such models would train wrongly.

    auto: AutoModelForCausalLM or another such class; config: with dropout off, from `weights.load_config`; dtype: of
    the run. The check always runs in fp32. Attention backends do not support it, so where one is used, packed rows and
    decode are also compared in the run's dtype, with the tolerance of bf16.
    """
    backend = backend_in_use()
    computed_by = "PyTorch" if backend is None else backend.name
    key = (
        getattr(auto, "__name__", str(auto)),
        config.to_json_string(),
        f"{device} {dtype} {computed_by} {layers_are_fused()}",
    )
    if key in _passed:
        return
    model_class = getattr(auto, "_model_mapping", {}).get(type(config), None)
    if isinstance(model_class, type):
        check_interface(model_class)  # first, because some of these architectures cannot be made small
    with torch.random.fork_rng():  # the check must not change the random numbers of the run
        with without_backend():
            _check_layers(auto, config, torch.float32, device)
        if backend is not None and dtype != torch.float32:
            _check_layers(auto, config, dtype, device)
    _passed.add(key)


def _check_layers(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Check a small model, with fused layers where it has them; if these are what is wrong, the error says so."""
    try:
        check_model(_small_model(auto, config, dtype, device))
    except ModelError as error:
        if not layers_are_fused():
            raise
        with layers_as(fused=False):
            check_model(_small_model(auto, config, dtype, device))
        raise ModelError(
            f"{error} Its fused layers compute something else than its own: with model.fused false it can be trained."
        ) from error


def _small_model(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        return miniature(auto, config, dtype, device)
    except MINIATURE_ERRORS as error:
        raise ModelError(
            f"{type(config).__name__}: no small model of it can be made for the check; that raises {summary_of(error)}."
            f" {WORKS}"
        ) from error


def check_model(model: PreTrainedModel) -> None:
    """Check this model, in eval mode; a causal model has a fused head afterwards. Raises ModelError."""
    original_attention = model.config._attn_implementation
    check_demands(model)
    trial = _Trial.of(model)
    with torch.no_grad(), computing_alone():
        # in order of length, because longer sequences may extend a rotary table
        expected = {s: trial.expected_outputs(s) for s in sorted(trial.sequences, key=len)}
        role = Policy(fuse_head(model)) if trial.causal else Backbone(model)
        hidden = _check_packed(trial, role, expected, original_attention)
        _check_train_mode(trial, role, hidden)
        if trial.causal:
            _check_decoding(trial, cast(Policy, role), expected)


@dataclass(frozen=True)
class _Trial:
    """The sequences on which a model is checked."""

    model: PreTrainedModel
    causal: bool  # whether it has a vocabulary head: then logprobs are compared, else hidden states
    sequences: tuple[tuple[int, ...], ...]  # of several lengths, the longest beyond the window and the rotary switch
    prompts: tuple[int, ...]  # prompt lengths of the first sequences, after which `STEPS` tokens each are decoded

    @staticmethod
    def of(model: PreTrainedModel) -> _Trial:
        config = model.config.get_text_config()
        switch, window = longrope_switch(config), getattr(config, "sliding_window", None)
        limits = (getattr(config, "max_position_embeddings", None), getattr(config, "attention_chunk_size", None))
        context = min([n for n in limits if isinstance(n, int) and n > 0] + [LONGEST])
        edges = [n for n in (switch, window) if isinstance(n, int) and n + BEYOND <= LONGEST]
        longest = min(context, max([12, *edges]) + BEYOND)
        decoded = min(longest, switch or longest)  # a response may not exceed it, see `rotary.PerSequence`
        prompts = [max(n - STEPS, 1) for n in (decoded, (decoded + STEPS) // 2, 2 + STEPS, decoded - 2)]
        if decoded <= STEPS:
            prompts = []
        lengths = [*(n + STEPS for n in prompts), longest, 3, 3, min(7, longest)]
        generator = torch.Generator().manual_seed(0)
        rows = model.get_input_embeddings().num_embeddings
        draws = (torch.randint(cast(int, rows), (n,), generator=generator) for n in lengths)
        causal = hasattr(model, "lm_head") or model.get_output_embeddings() is not None
        return _Trial(model, causal, tuple(tuple(draw.tolist()) for draw in draws), tuple(prompts))

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def packed(self) -> Packed:
        return pack(self.sequences, [1] * len(self.sequences)).to(self.model.device)

    def expected_outputs(self, sequence: tuple[int, ...]) -> Tensor:
        """Outputs of the model's own forward pass on one sequence, (n, V) logprobs or (n, H) hidden states."""
        network = self.model if self.causal else self.model.base_model
        tokens = torch.tensor([sequence], device=self.model.device)
        try:
            states = network(tokens, use_cache=False)
        except Exception as error:
            raise self.failed(f"its own forward pass fails on {len(sequence)} tokens", error) from error
        if self.causal:
            return cast(Tensor, states.logits[0].float().log_softmax(-1))
        return cast(Tensor, states.last_hidden_state[0].float())

    def outputs(self, hidden: Tensor) -> Tensor:
        """Outputs of the kind of `expected_outputs` from hidden states (N, H)."""
        return self.model.get_output_embeddings()(hidden).float().log_softmax(-1) if self.causal else hidden.float()

    def error(self, outputs: Tensor, expected: Tensor) -> float:
        """The mean absolute difference of two tensors, over the standard deviation of the second."""
        return float((outputs - expected).abs().mean() / expected.std())

    def differs(self, error: float) -> bool:
        return not error <= (TOLERANCE if self.model.dtype == torch.float32 else TOLERANCE_BF16)  # NaN differs

    def refused(self, reason: str, error: float) -> ModelError:
        by = f"outputs off by {error:.2g} of their standard deviation"
        return ModelError(f"{self.name} cannot be trained here: {reason} ({by}). {WORKS}")

    def failed(self, what: str, error: Exception) -> ModelError:
        """The error for an exception during the check: fastppo's whole message, another library's first line."""
        if isinstance(error, FastPPOError):
            return ModelError(f"{self.name} cannot be trained here: {error}")
        raised = f"its code raises {summary_of(error)}{place_of(error)}"
        return ModelError(f"{self.name} cannot be trained here: {what}: {raised}. {WORKS}")


def _check_packed(
    trial: _Trial, role: Backbone, expected: dict[tuple[int, ...], Tensor], original_attention: str
) -> Tensor:
    """Compare the outputs of packed rows with those of single sequences; returns the packed hidden states (N, H)."""
    try:
        hidden = role.hidden(trial.packed)
        outputs = trial.outputs(hidden)
    except Exception as error:
        raise trial.failed("its forward pass fails on packed rows", error) from error
    expected_outputs = torch.cat([expected[s] for s in trial.sequences])
    if trial.differs(difference := trial.error(outputs, expected_outputs)):
        raise trial.refused(_reason(_why_packed, trial, role, original_attention), difference)
    return hidden


def _check_train_mode(trial: _Trial, role: Backbone, eval_hidden: Tensor) -> None:
    """Compare two passes in train mode with activation checkpointing, as learning makes them, with one in eval mode.

    Randomness in these passes would make every ratio of two policies wrong, without an error.
    """
    packed = trial.packed
    model: Any = role.model
    checkpointing = model.supports_gradient_checkpointing
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    role.train()
    try:
        passes = [role.hidden(packed) for _ in range(2)]
    except Exception as error:
        raise trial.failed("its forward pass fails in train mode", error) from error
    finally:
        role.eval()
        if checkpointing:
            model.gradient_checkpointing_disable()
    exact = role.device.type == "cpu"  # a GPU may sum in another order at each pass

    def differ(one: Tensor, other: Tensor) -> bool:
        return not torch.equal(one, other) if exact else trial.differs(trial.error(one.float(), other.float()))

    if any(differ(hidden, eval_hidden) for hidden in passes):
        reason = "in train mode it computes something else than in eval mode"
        if differ(*passes):
            reason = "two passes in train mode differ, by something random that its config does not switch off"
        largest = max(trial.error(hidden.float(), eval_hidden.float()) for hidden in passes)
        raise trial.refused(reason, largest)


def _check_decoding(trial: _Trial, policy: Policy, expected: dict[tuple[int, ...], Tensor]) -> None:
    """Compare a prefill and decode steps, as sampling makes them, with the forward pass over whole sequences."""
    sequences = trial.sequences[: len(trial.prompts)]
    if not sequences:
        log.info("%s: its context is too short to check decoding", trial.name)
        return
    expected_outputs = torch.cat([expected[s] for s in sequences])
    try:
        hidden = _decode(policy, sequences, trial.prompts)
    except Exception as error:
        raise trial.failed("decoding token by token fails", error) from error
    if trial.differs(difference := trial.error(trial.outputs(hidden), expected_outputs)):
        raise trial.refused(_reason(_why_decoded, trial, policy, sequences), difference)


def _decode(policy: Policy, sequences: tuple[tuple[int, ...], ...], prompts: tuple[int, ...]) -> Tensor:
    """Hidden states (N, H) of all tokens of the sequences: packed prompts first, then decoded token by token."""
    config, device = policy.model.config.get_text_config(), policy.device
    cache = Cache(config, len(sequences), max(map(len, sequences)), policy.model.dtype, device)
    counts = torch.tensor(prompts, device=device)
    prompt_tokens = torch.tensor([t for s, n in zip(sequences, prompts, strict=True) for t in s[:n]], device=device)
    cache.begin_prefill(prompts, range(len(prompts)))
    rows = [[part] for part in policy.prefill(prompt_tokens, segment_offsets(counts), cache).split(list(prompts))]
    cache.begin_decode()
    all_rows = torch.arange(len(sequences), device=device)
    for step in range(STEPS):
        cache.begin_step(all_rows)
        tokens = torch.tensor([s[n + step] for s, n in zip(sequences, prompts, strict=True)], device=device)
        for row, hidden in zip(rows, policy.step(tokens, cache.lengths[all_rows], cache), strict=True):
            row.append(hidden[None])
        cache.end_step()
    return torch.cat([part for row in rows for part in row])


def _reason(why: Callable[..., str], trial: _Trial, *args: Any) -> str:
    try:
        return why(trial, *args)
    except Exception as error:  # the layers may return something other than states; report the refusal in any case
        log.info("%s: the first wrong layer cannot be determined (%s)", trial.name, error)
        return "its packed rows or decode steps differ from its own forward pass"


def _why_packed(trial: _Trial, role: Backbone, original_attention: str) -> str:
    """The reason why packed rows differ from single sequences, from the outputs of the layers."""

    def states(*sequences: tuple[int, ...]) -> list[Tensor]:
        with _recorded_outputs(trial.model) as outputs:
            role.hidden(pack(sequences, [1] * len(sequences)).to(role.device))
        return [layer[0].flatten(0, -2) for layer in outputs]

    def joined(each: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(layers) for layers in zip(*each, strict=True)]

    packed, single = states(*trial.sequences), joined([states(s) for s in trial.sequences])
    if (layer := _first_different(trial, packed, single)) is not None:
        return f"{_layer_name(trial, layer)} mixes positions across packed sequences"
    original, last_states = [], []
    trial.model.set_attn_implementation(original_attention)
    for sequence in trial.sequences:
        with _recorded_outputs(trial.model) as outputs:
            output = trial.model.base_model(torch.tensor([sequence], device=role.device), use_cache=False)
        original.append([layer[0].flatten(0, -2) for layer in outputs])
        last_states.append(output.last_hidden_state[0])
    trial.model.set_attn_implementation(ATTENTION)
    differs = f"computes something else with fastppo's causal attention than with its own ({original_attention})"
    if (layer := _first_different(trial, single, joined(original))) is not None:
        return f"{_layer_name(trial, layer)} {differs}, on a single sequence too"
    if trial.differs(trial.error(role.hidden(trial.packed).float(), torch.cat(last_states).float())):
        return f"the computation after its layers {differs}"
    return "its outputs are not those of a linear head on its last states: it scales them, or adds to them"


def _why_decoded(trial: _Trial, policy: Policy, sequences: tuple[tuple[int, ...], ...]) -> str:
    """The reason why decoding differs from the forward pass over whole sequences, from the outputs of the layers."""
    with _recorded_outputs(trial.model) as whole:
        policy.hidden(pack(sequences, [1] * len(sequences)).to(policy.device))
    with _recorded_outputs(trial.model) as steps:
        _decode(policy, sequences, trial.prompts)
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0)
    newest = [torch.stack([layer[0].flatten(0, -2)[end - 1] for end in ends]) for layer in whole]
    layer = _first_different(trial, [layer[-1].flatten(0, -2) for layer in steps], newest)
    place = ""
    if layer is not None:
        place = f", from {_layer_name(trial, layer)} on: it needs more state of a sequence than keys and values"
    return f"decoding token by token differs from the whole pass{place}"


def _first_different(trial: _Trial, outputs: list[Tensor], expected: list[Tensor]) -> int | None:
    """The lowest layer whose outputs differ; None if none differs, or if the model has no list of layers."""
    for layer, (one, other) in enumerate(zip(outputs, expected, strict=False)):
        if one.shape == other.shape and trial.differs(trial.error(one.float(), other.float())):
            return layer
    return None


def _layer_name(trial: _Trial, layer: int) -> str:
    text = trial.model.config.get_text_config()
    lists = (getattr(text, name, None) for name in ("layer_types", "layers_block_type"))
    kinds: list[str] = next((kinds for kinds in lists if kinds), [])
    return f"layer {layer} ({kinds[layer]})" if layer < len(kinds) else f"layer {layer}"


@contextmanager
def _recorded_outputs(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """Within this context, the output of each layer in each pass: layer -> pass -> states."""
    parent_and_name = layers_of(model)
    layers = [] if parent_and_name is None else list(cast(nn.ModuleList, getattr(*parent_and_name)))
    states: list[list[Tensor]] = [[] for _ in layers]

    def append_to(passes: list[Tensor]) -> Any:
        return lambda module, args, output: passes.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(append_to(passes)) for layer, passes in zip(layers, states, strict=True)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()

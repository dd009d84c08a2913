"""Whether a model computes on packed rows, in train mode and while it decodes what its own forward pass does.

A model that needs more than causal attention over its own sequence (ALiBi, a recurrent state, an attention of its own
outside transformers' registry) would train wrongly without a word; it is refused here, with the layer that is to blame.
The code decides that and not the weights, so it is tried on a small random model of the same config, in fp32.
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
from fastppo.models.attention import ATTENTION, Cache, uses_flash, without_flash
from fastppo.models.frozen_prefix import layers_of
from fastppo.models.loading.demands import WORKS, check_demands, check_interface
from fastppo.models.loading.miniature import MISFIT, miniature
from fastppo.models.loading.model_code import said, where
from fastppo.models.roles import Backbone, ModelError, Policy, fuse_head
from fastppo.models.rotary import switch_of

log = logging.getLogger("fastppo")

# Mean difference from the model's own outputs, over their standard deviation. In fp32 it is about 1e-6 for what is
# right (1e-4 for Gemma-3n, whose thresholds make much of rounding) and 1e-2 or more for what is wrong.
TOLERANCE, TOLERANCE_BF16 = 1e-3, 1e-1
STEPS = 6  # of decode
LONGEST, BEYOND = 64, 6  # tokens of the longest sequence tried, and how far beyond a window it goes

_passed: set[tuple[str, str, str]] = set()  # what `check_kind` has found right in this process


def check_kind(auto: Any, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Check models of this config, on a small one. Raises ModelError with the reason if they would train wrongly.

    auto: AutoModelForCausalLM or another such class; config: with dropout off, as `weights.load_config` has it; dtype:
    of the run. The check is in fp32 whatever that is. flash-attn knows no fp32, so where it is to compute, packed rows
    and decode are compared in the run's dtype too, with the tolerance that bf16 needs.
    """
    name = (getattr(auto, "__name__", str(auto)), config.to_json_string(), f"{device} {dtype} {uses_flash()}")
    if name in _passed:
        return
    kind = getattr(auto, "_model_mapping", {}).get(type(config), None)
    if isinstance(kind, type):
        check_interface(kind)  # before a model is made that nobody knows how to make small
    with torch.random.fork_rng():  # the run's own random numbers do not depend on it
        with without_flash():
            check_model(_small(auto, config, torch.float32, device))
        if uses_flash() and dtype != torch.float32:
            check_model(_small(auto, config, dtype, device))
    _passed.add(name)


def _small(auto: Any, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    try:
        return miniature(auto, config, dtype, device)
    except MISFIT as error:
        raise ModelError(
            f"{type(config).__name__}: no small model can be made of it to try it; that raises {said(error)}. {WORKS}"
        ) from error


def check_model(model: PreTrainedModel) -> None:
    """Check this very model, in eval mode; a causal one has a fused head then. Raises ModelError."""
    own = model.config._attn_implementation
    check_demands(model)
    trial = _Trial.of(model)
    with torch.no_grad():
        expected = {s: trial.own(s) for s in sorted(trial.sequences, key=len)}  # longer ones may grow a rotary table
        role = Policy(fuse_head(model)) if trial.causal else Backbone(model)
        whole = _whole(trial, role, expected, own)
        _repeated(trial, role, whole)
        if trial.causal:
            _decoded(trial, cast(Policy, role), expected, own)


@dataclass(frozen=True)
class _Trial:
    """The sequences that a model is tried on."""

    model: PreTrainedModel
    causal: bool  # whether it has a vocabulary head: then logprobs are compared, else hidden states
    sequences: tuple[tuple[int, ...], ...]  # of several lengths, the longest beyond the window and the rotary switch
    prompts: tuple[int, ...]  # the first sequences are decoded from these prompt lengths on, `STEPS` tokens each

    @staticmethod
    def of(model: PreTrainedModel) -> _Trial:
        config = model.config.get_text_config()
        switch, window = switch_of(config), getattr(config, "sliding_window", None)
        limits = (getattr(config, "max_position_embeddings", None), getattr(config, "attention_chunk_size", None))
        context = min([n for n in limits if isinstance(n, int) and n > 0] + [LONGEST])
        edges = [n for n in (switch, window) if isinstance(n, int) and n + BEYOND <= LONGEST]
        longest = min(context, max([12, *edges]) + BEYOND)
        decoded = min(longest, switch or longest)  # a response may not cross it, see `load._check_switch`
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

    def own(self, sequence: tuple[int, ...]) -> Tensor:
        """What the model itself computes on one sequence, (n, V) logprobs or (n, H) hidden states."""
        network = self.model if self.causal else self.model.base_model
        tokens = torch.tensor([sequence], device=self.model.device)
        try:
            states = network(tokens, use_cache=False)
        except Exception as error:
            raise self.failed(f"its own forward pass fails on {len(sequence)} tokens", error) from error
        if self.causal:
            return cast(Tensor, states.logits[0].float().log_softmax(-1))
        return cast(Tensor, states.last_hidden_state[0].float())

    def read(self, hidden: Tensor) -> Tensor:
        """(N, H) hidden states as what `own` gives."""
        return self.model.get_output_embeddings()(hidden).float().log_softmax(-1) if self.causal else hidden.float()

    def error(self, found: Tensor, expected: Tensor) -> float:
        """How far two sets of outputs are apart in the mean, over the second's standard deviation."""
        return float((found - expected).abs().mean() / expected.std())

    def differs(self, error: float) -> bool:
        return not error <= (TOLERANCE if self.model.dtype == torch.float32 else TOLERANCE_BF16)  # NaN differs

    def refused(self, reason: str, error: float) -> ModelError:
        by = f"outputs off by {error:.2g} of their standard deviation"
        return ModelError(f"{self.name} cannot be trained here: {reason} ({by}). {WORKS}")

    def failed(self, what: str, error: Exception) -> ModelError:
        """Of an error on the way: ours says all, including the way out, another library's its first line."""
        if isinstance(error, FastPPOError):
            return ModelError(f"{self.name} cannot be trained here: {error}")
        raised = f"its code raises {said(error)}{where(error)}"
        return ModelError(f"{self.name} cannot be trained here: {what}: {raised}. {WORKS}")


def _whole(trial: _Trial, role: Backbone, expected: dict[tuple[int, ...], Tensor], own: str) -> Tensor:
    """Compare packed rows with one sequence at a time; returns hidden states of all (N, H)."""
    try:
        hidden = role.hidden(trial.packed)
        found = trial.read(hidden)
    except Exception as error:
        raise trial.failed("its forward pass fails on packed rows", error) from error
    alone = torch.cat([expected[s] for s in trial.sequences])
    if trial.differs(apart := trial.error(found, alone)):
        raise trial.refused(_reason(_why_packed, trial, role, own), apart)
    return hidden


def _repeated(trial: _Trial, role: Backbone, whole: Tensor) -> None:
    """Compare two passes as they are made for learning, in train mode with activation checkpointing, with one in eval.

    Without a word, noise would make every ratio of two policies wrong.
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
    exact = role.device.type == "cpu"  # a GPU may add in another order each time

    def differ(one: Tensor, other: Tensor) -> bool:
        return not torch.equal(one, other) if exact else trial.differs(trial.error(one.float(), other.float()))

    if any(differ(hidden, whole) for hidden in passes):
        again = "two passes in train mode differ, by something random that its config does not switch off"
        other = "in train mode it computes something else than in eval mode"
        most = max(trial.error(hidden.float(), whole.float()) for hidden in passes)
        raise trial.refused(again if differ(*passes) else other, most)


def _decoded(trial: _Trial, policy: Policy, expected: dict[tuple[int, ...], Tensor], own: str) -> None:
    """Compare a prefill and decode steps, as the sampler makes them, with the whole pass."""
    sequences = trial.sequences[: len(trial.prompts)]
    if not sequences:
        log.info("%s takes too few tokens to try how it decodes", trial.name)
        return
    whole = torch.cat([expected[s] for s in sequences])
    try:
        hidden = _decode(policy, sequences, trial.prompts)
    except Exception as error:
        raise trial.failed("decoding token by token fails", error) from error
    if trial.differs(apart := trial.error(trial.read(hidden), whole)):
        raise trial.refused(_reason(_why_decoded, trial, policy, sequences), apart)


def _decode(policy: Policy, sequences: tuple[tuple[int, ...], ...], prompts: tuple[int, ...]) -> Tensor:
    """Hidden states of all tokens of the sequences, end to end (N, H): of the prompts packed, then token by token."""
    config, device = policy.model.config.get_text_config(), policy.device
    cache = Cache(config, len(sequences), max(map(len, sequences)), policy.model.dtype, device)
    counts = torch.tensor(prompts, device=device)
    first = torch.tensor([t for s, n in zip(sequences, prompts, strict=True) for t in s[:n]], device=device)
    cache.begin_prefill(list(prompts))
    rows = [[part] for part in policy.prefill(first, segment_offsets(counts), cache).split(list(prompts))]
    cache.begin_decode()
    everyone = torch.arange(len(sequences), device=device)
    for step in range(STEPS):
        cache.begin_step(everyone)
        tokens = torch.tensor([s[n + step] for s, n in zip(sequences, prompts, strict=True)], device=device)
        for row, hidden in zip(rows, policy.step(tokens, cache.lengths[everyone], cache), strict=True):
            row.append(hidden[None])
        cache.end_step()
    return torch.cat([part for row in rows for part in row])


def _reason(why: Callable[..., str], trial: _Trial, *args: Any) -> str:
    try:
        return why(trial, *args)
    except Exception as error:  # layers that hand up something else than states; the refusal is what counts
        log.info("%s: the layer that is to blame cannot be told (%s)", trial.name, error)
        return "its packed rows or decode steps are not what its own forward pass computes"


def _why_packed(trial: _Trial, role: Backbone, own: str) -> str:
    """The reason why packed rows differ from single sequences, as far as the states that layers hand up tell it."""

    def states(*sequences: tuple[int, ...]) -> list[Tensor]:
        with _handed_up(trial.model) as found:
            role.hidden(pack(sequences, [1] * len(sequences)).to(role.device))
        return [layer[0].flatten(0, -2) for layer in found]

    def joined(each: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(layers) for layers in zip(*each, strict=True)]

    together, alone = states(*trial.sequences), joined([states(s) for s in trial.sequences])
    if (layer := _first_apart(trial, together, alone)) is not None:
        return f"{_layer(trial, layer)} mixes positions across packed sequences"
    originals, last = [], []
    trial.model.set_attn_implementation(own)
    for sequence in trial.sequences:
        with _handed_up(trial.model) as found:
            output = trial.model.base_model(torch.tensor([sequence], device=role.device), use_cache=False)
        originals.append([layer[0].flatten(0, -2) for layer in found])
        last.append(output.last_hidden_state[0])
    trial.model.set_attn_implementation(ATTENTION)
    otherwise = f"computes something else through fastppo's causal attention than through its own ({own})"
    if (layer := _first_apart(trial, alone, joined(originals))) is not None:
        return f"{_layer(trial, layer)} {otherwise}, on a single sequence too"
    if trial.differs(trial.error(role.hidden(trial.packed).float(), torch.cat(last).float())):
        return f"what it makes of its layers' states {otherwise}"
    return "its outputs are not those of a linear head on its last states: it scales them, or adds to them"


def _why_decoded(trial: _Trial, policy: Policy, sequences: tuple[tuple[int, ...], ...]) -> str:
    with _handed_up(trial.model) as whole:
        policy.hidden(pack(sequences, [1] * len(sequences)).to(policy.device))
    with _handed_up(trial.model) as parts:
        _decode(policy, sequences, trial.prompts)
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0)
    newest = [torch.stack([layer[0].flatten(0, -2)[end - 1] for end in ends]) for layer in whole]
    layer = _first_apart(trial, [layer[-1].flatten(0, -2) for layer in parts], newest)
    where = (
        "" if layer is None else f", from {_layer(trial, layer)} on: it keeps more of a sequence than keys and values"
    )
    return f"decoding token by token differs from the whole pass{where}"


def _first_apart(trial: _Trial, found: list[Tensor], expected: list[Tensor]) -> int | None:
    """The lowest layer whose states differ; None if none does, or if the model's layers cannot be told apart."""
    for layer, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one.shape == other.shape and trial.differs(trial.error(one.float(), other.float())):
            return layer
    return None


def _layer(trial: _Trial, layer: int) -> str:
    text = trial.model.config.get_text_config()
    lists = (getattr(text, name, None) for name in ("layer_types", "layers_block_type"))
    kinds: list[str] = next((kinds for kinds in lists if kinds), [])
    return f"layer {layer} ({kinds[layer]})" if layer < len(kinds) else f"layer {layer}"


@contextmanager
def _handed_up(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """Within this context, what each layer hands up in each pass: layer -> pass -> states."""
    found = layers_of(model)
    layers = [] if found is None else list(cast(nn.ModuleList, getattr(*found)))
    states: list[list[Tensor]] = [[] for _ in layers]

    def keep(into: list[Tensor]) -> Any:
        return lambda module, args, output: into.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep(into)) for layer, into in zip(layers, states, strict=True)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()

"""The seconds of a PPO step on H100s, modelled from the kernels that it launches: no GPU is needed, and none was timed.

    python bench/modelled_step.py [1b | 8b | tiny]...

The models of a step run on the meta device, on shapes alone. Each kernel takes its bytes over the bandwidth or its
products over the peak, whichever is longer, and what lies between kernels. `roofline` has the products, attention and
the passes over logits alone, with nothing between them; `as written` the model's own layers, activations computed again
where they did not fit, and every part of the run moved out of the GPU where a phase does not use it; `now` the fused
layers (`model.fused`), and what the memory plan chooses to compute again and to move on GPUs of 80 GB. The constants
are printed. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from kernel_seconds import Gpu, Kernels
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo import ops
from fastppo.config import (
    ActorConfig,
    Config,
    CriticConfig,
    DataConfig,
    LayersConfig,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    ZeroConfig,
)
from fastppo.distributed import Placement
from fastppo.models import Cache, Critic, Policy, RewardModel, ValueHead, fuse_head
from fastppo.models.attention import compute_with
from fastppo.models.backends.varlen import VarlenAttention
from fastppo.models.cache import SequenceLayout
from fastppo.models.layers.fuse import layers_as
from fastppo.planner.machine import Machine
from fastppo.planner.plan import Plan, make_plan
from fastppo.planner.time.moves import moved_bytes

META, DTYPE = torch.device("meta"), torch.bfloat16


class Case(NamedTuple):
    """A model's shape, and a step of a run."""

    model: dict[str, Any]
    ranks: int
    sequences: int  # of a step, over all ranks
    prompt: int  # tokens
    response: int
    shared: bool  # whether actor and critic share the backbone
    checkpointed: bool  # whether activations had to be computed again before layers were fused
    stage: Literal[1, 2]  # of ZeRO

    @property
    def length(self) -> int:
        return self.prompt + self.response


def llama(hidden: int, inner: int, layers: int, heads: int, vocabulary: int, *, tied: bool) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads // 4, "head_dim": hidden // heads}
    return shape | {"tie_word_embeddings": tied, "max_position_embeddings": 8192, "pad_token_id": 0}


CASES = {
    "1b": Case(llama(2048, 8192, 16, 32, 128_256, tied=True), 1, 128, 128, 256, False, False, 1),  # Llama-3.2-1B
    "8b": Case(llama(4096, 14_336, 32, 32, 128_256, tied=False), 8, 512, 512, 512, True, True, 2),  # Llama-3.1-8B
    "tiny": Case(llama(64, 128, 2, 4, 512, tied=False), 2, 8, 16, 16, True, True, 1),
}

# Bytes of an optimizer step for each parameter: gradient, weight in fp32, two moments, each but the first also written,
# and the weight in bf16; before it the gradient's norm. A microbatch's gradient is added to the sum in fp32.
ADAM_BYTES, ADD_BYTES = 4 + 3 * 8 + 2 + 4, 2 + 8


def attend_cached(*tensors: Tensor, scale: float, window: int, softcap: float) -> Tensor:
    """`ops.attend_cached` as on a GPU, where it is one kernel."""
    return torch.ops.fastppo.attend_cached(*tensors, scale, window, softcap)


class Seconds(NamedTuple):
    """Of a phase, or of a part of it."""

    modelled: float = 0.0
    roofline: float = 0.0
    kernels: int = 0

    def __add__(self, other: Any) -> Seconds:
        return Seconds(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, times: Any) -> Seconds:
        return Seconds(self.modelled * times, self.roofline * times, round(self.kernels * times))


class Step(NamedTuple):
    """The phases of a step of a case on this GPU."""

    case: Case
    gpu: Gpu
    fused: bool
    recomputed: float  # share of the layers whose activations are computed again
    ppo: PPOConfig = PPOConfig()

    def passes(self, compute: Callable[[], Any], length: int, *, in_graph: bool = False) -> Seconds:
        with Kernels(self.gpu, length) as kernels:
            compute()
        launched, gpu = kernels.counts.total(), self.gpu
        if in_graph:
            return Seconds(kernels.seconds + launched * gpu.gap_in_graph, kernels.roofline, launched)
        modelled = max(kernels.seconds + launched * gpu.gap, launched * gpu.launch)
        return Seconds(modelled, kernels.roofline, launched)

    def phases(self) -> dict[str, Seconds]:
        case, tokens = self.case, self.ppo.microbatch_tokens
        each = max(1, min(tokens // case.length, case.sequences // case.ranks))  # sequences of a microbatch
        microbatches = case.sequences / case.ranks / each
        with layers_as(fused=self.fused):
            policy, critic, reward = make_roles(case.model)
        found = {"sampling": self.sampling(policy)}
        with torch.no_grad():
            forward = self.passes(lambda: reward.head(states(reward, each, case.length)[:each]), case.length)
        found["feedback"] = forward * microbatches
        with torch.no_grad():
            asked = self.passes(lambda: self.ask(policy, each), case.length) * 2  # actor and reference
            if not case.shared:
                asked += self.passes(lambda: critic.value_head(self.responses(critic, each)), case.length)
        found["experience"] = asked * microbatches
        roles = [policy] if case.shared else [policy, critic]
        learnt = self.passes(lambda: self.learn(roles, each), case.length)
        if self.recomputed:
            with torch.no_grad():
                again = self.passes(lambda: [states(role, each, case.length) for role in roles], case.length)
            learnt += again * self.recomputed
        updates, times = self.ppo.epochs * self.ppo.minibatches, self.ppo.epochs * microbatches
        weights = sum(p.numel() for role in roles for p in role.parameters())
        found["learning"] = learnt * times + self.optimizer(weights, times, updates)
        return found

    def sampling(self, policy: Policy) -> Seconds:
        """Prompts together, then a step for each token of the responses, in a CUDA graph."""
        case = self.case
        rows = case.sequences // case.ranks
        cache = Cache(policy.model.config, rows, case.length, DTYPE, META)
        at, newest = torch.zeros(2, rows, dtype=torch.int64, device=META)

        def step() -> None:
            cache.begin_step(at)
            logits = F.linear(policy.step(newest, cache.lengths[at], cache), policy.head.weight)
            ops.sample_tokens(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, stream=at, offset=at)
            cache.end_step()

        with torch.no_grad():
            prompts = self.passes(lambda: states(policy, rows, case.prompt), case.prompt)
            compute_with(None)
            steps = self.passes(step, case.prompt + case.response // 2, in_graph=True)
            compute_with(VarlenAttention(varlen_attn))
        return prompts + steps * case.response

    def responses(self, role: Any, sequences: int) -> Tensor:
        predictors = torch.zeros(sequences * self.case.response, dtype=torch.int64, device=META)
        return states(role, sequences, self.case.length)[predictors]

    def ask(self, policy: Policy, sequences: int) -> None:
        hidden = self.responses(policy, sequences)
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=META)
        ops.linear_logprobs(hidden, policy.head.weight, targets, temperature=1.0)

    def learn(self, roles: list[Any], sequences: int) -> None:
        """A microbatch: actor and critic, or one model that is both."""
        ppo, states_of = self.ppo, [self.responses(role, sequences) for role in roles]
        hidden, seen = states_of[0], states_of[-1]
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=META)
        old, normalizer = torch.zeros(2, len(hidden), device=META), torch.ones((), device=META)
        scale = {"temperature": 1.0, "entropy_coef": ppo.entropy_coef, "normalizer": normalizer}
        clips = {"clip_low": ppo.clip_low, "clip_high": ppo.clip_high, "dual_clip": ppo.dual_clip}
        loss, _ = ops.linear_policy_loss(hidden, roles[0].head.weight, targets, *old, **scale, **clips)
        values = roles[-1].value_head(seen)
        value_loss, _ = ops.value_loss(values, *old, clip=ppo.value_clip, normalizer=normalizer)
        (loss + value_loss).backward()

    def optimizer(self, weights: int, microbatches: float, updates: int) -> Seconds:
        """Sums of gradients, their mean over ranks, and Adam on a rank's part of the states."""
        case, gpu, others = self.case, self.gpu, (self.case.ranks - 1) / self.case.ranks
        adam = weights / case.ranks * ADAM_BYTES / (gpu.bandwidth * gpu.bandwidth_share)
        gathered = others * weights * 2 / gpu.link  # weights in bf16
        # Stage 1 scatters the sums in fp32 once an update, stage 2 the gradients in bf16 once a microbatch.
        scattered = others * weights * (4 * updates if case.stage == 1 else 2 * microbatches) / gpu.link
        added = weights / (1 if case.stage == 1 else case.ranks) * ADD_BYTES / (gpu.bandwidth * gpu.bandwidth_share)
        roofline = (adam + gathered) * updates + scattered
        return Seconds(added * microbatches + roofline, roofline)


def make_roles(shape: dict[str, Any]) -> tuple[Policy, Critic, RewardModel]:
    config = AutoConfig.for_model("llama", **shape)
    with META:
        policy, critic = (AutoModelForCausalLM.from_config(config, dtype=DTYPE) for _ in range(2))
        config.num_labels = 1
        reward = AutoModelForSequenceClassification.from_config(config, dtype=DTYPE)
    heads = [ValueHead(config.hidden_size, DTYPE, META) for _ in range(2)]
    return Policy(fuse_head(policy), heads[0]), Critic(critic.base_model, heads[1]), RewardModel(reward)


def states(role: Any, sequences: int, length: int) -> Tensor:
    """The hidden states of so many sequences, (N, H)."""
    tokens = torch.zeros(1, sequences * length, dtype=torch.int64, device=META)
    layout = SequenceLayout.of([length] * sequences, META)
    output = role.model.base_model(input_ids=tokens, position_ids=tokens, packed=layout, use_cache=False)
    return output.last_hidden_state[0]


ORDER = ("sampling", "feedback", "experience", "learning")


def plan_of(case: Case, *, fused: bool) -> Plan:
    """The plan of such a run on GPUs of 80 GB."""
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model("llama", **case.model)
        for name, head in (("actor", "ForCausalLM"), ("reward", "ForSequenceClassification")):
            config.architectures, config.num_labels = [f"Llama{head}"], 1
            config.save_pretrained(Path(folder) / name)
        run = Config(
            actor=ActorConfig(model=f"{folder}/actor"),
            critic=CriticConfig(kind="shared" if case.shared else "separate"),
            rewards=(RewardConfig(model=f"{folder}/reward"),),
            data=DataConfig(max_prompt_tokens=case.prompt),
            sampling=SamplingConfig(max_new_tokens=case.response, rows=case.sequences // case.ranks),
            ppo=PPOConfig(batch_size=case.sequences),
            zero=ZeroConfig(stage=case.stage),
            model=LayersConfig(fused=fused),
        )
        return make_plan(run, Machine(gpus=case.ranks, nodes=1, gpu=80 * 10**9, host=2 * 10**12))


def moves(plan: Plan, placement: Placement, gpu: Gpu, *, back: bool) -> dict[str, float]:
    """Seconds of moves at the beginning of each phase."""
    return {phase: size / gpu.host for phase, size in moved_bytes(plan, placement, back=back).items()}


def table(case: Case, gpu: Gpu) -> dict[str, Any]:
    """Print and return the seconds of each phase."""
    plan = plan_of(case, fused=True)
    recomputed, depth = plan.recomputed or (0, 1)
    before = Step(case, gpu, fused=False, recomputed=float(case.checkpointed)).phases()
    fused = Step(case, gpu, fused=True, recomputed=recomputed / depth).phases()
    every = replace(plan.placement, moved=None, beside={})
    moved_before, moved = moves(plan, every, gpu, back=True), moves(plan, plan.placement, gpu, back=False)
    print("\n".join(plan.choices))
    print(f"{'seconds':12} {'roofline':>9} {'as written':>11} {'moves':>9} {'now':>9} {'moves':>9}   kernels")
    for phase, own in before.items():
        now = fused[phase]
        seconds = f"{now.roofline:9.3f} {own.modelled:11.3f} {moved_before[phase]:9.3f}"
        seconds += f" {now.modelled:9.3f} {moved[phase]:9.3f}"
        print(f"{phase:12} {seconds}   {own.kernels:,} -> {now.kernels:,}")
    roofline = sum(x.roofline for x in fused.values())
    sums = [sum(moved_before.values()), sum(moved.values())]
    totals = [sum(x.modelled for x in step.values()) + m for step, m in zip((before, fused), sums, strict=True)]
    print(
        f"{'with moves':12} {roofline:9.3f} {totals[0]:11.3f} {sums[0]:9.3f} {totals[1]:9.3f} {sums[1]:9.3f}",
        flush=True,
    )
    phases = {name: {p: x._asdict() for p, x in step.items()} for name, step in (("before", before), ("fused", fused))}
    found = {"moves": moved, "moves_before": moved_before, "recomputed": recomputed}
    return phases | found | {"step": dict(zip(("before", "fused"), totals, strict=True))}


def main(names: list[str]) -> None:
    gpu = Gpu()
    compute_with(VarlenAttention(varlen_attn))
    torch.cuda.is_current_stream_capturing = lambda: True  # transformers looks at no tensor's content then
    ops.attend_cached = attend_cached
    print("Modelled, not measured. " + ", ".join(f"{name} {value:g}" for name, value in gpu._asdict().items()))
    result: dict[str, Any] = {"gpu": gpu._asdict()}
    for name in names:
        case = CASES[name]
        print(f"\n{name}, {case.ranks} GPUs, {case.sequences} x ({case.prompt} + {case.response})")
        result[name] = table(case, gpu)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:] or ["1b", "8b"])

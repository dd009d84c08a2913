"""Every causal family that transformers has, in miniature, on a run's way: planned, loaded, updated, exported.

A config is shrunk attribute by attribute; what of it hangs together in one family alone stands in `SPECIAL`.
"""

from __future__ import annotations

import copy
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from value_models import wrong_values

from fastppo import ops
from fastppo.checkpoint.export import write_critic, write_model
from fastppo.config import Config
from fastppo.config.command_line import parse
from fastppo.data.batch import Prompts
from fastppo.data.packed import Packed, pack
from fastppo.errors import FastPPOError
from fastppo.models.loading.policies import check_models, load_actor_tokenizer, load_policies
from fastppo.models.roles import Critic, Policy
from fastppo.models.sampling_weights import SamplingWeights
from fastppo.planner.machine import Machine
from fastppo.planner.plan import make_plan
from fastppo.ppo.progress import PPOProgress
from fastppo.ppo.terms import Targets, Totals, clip_term, value_term
from fastppo.rollout import InProcess

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY, CONTEXT, LAYERS = 257, 128, 2

# The size of each attribute here, by the names that configs have for it. Smaller ones stay as they are.
SIZES: dict[str, int] = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size vocab_size_per_layer_input decoder_vocab_size audio_vocab_size"),
        (CONTEXT, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length rel_extent"),
        (
            64,
            "intermediate_size ffn_dim d_ff ffn_hidden_size n_inner encoder_ffn_dim decoder_ffn_dim dim_ff dff mlp_dim",
        ),
        (64, "shared_intermediate_size intermediate_size_mlp dense_intermediate_size expert_ffn_hidden_size"),
        (32, "hidden_size d_model n_embd dim_model embedding_size word_embed_proj_dim emb_dim attention_hidden_size"),
        (32, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size hidden_dim"),
        (32, "backbone_hidden_size lru_width mamba_d_ssm"),
        (
            16,
            "q_lora_rank kv_lora_rank o_lora_rank mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size",
        ),
        (
            16,
            "hidden_size_per_layer_input laurel_rank time_step_rank mamba_dt_rank index_topk ple_embed_dim hc_lowrank",
        ),
        (16, "num_centroids"),
        (8, "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim global_head_dim swa_head_dim dim_head d_kv d_rel"),
        (8, "attention_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim"),
        (8, "kv_channels index_head_dim rotary_dim sliding_window sliding_window_size attention_window_size"),
        (8, "attention_chunk_size local_attention window_size num_experts n_routed_experts num_local_experts"),
        (8, "moe_num_experts zero_expert_num index_n_heads"),
        (4, "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"),
        (4, "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads"),
        (4, "linear_num_key_heads linear_num_value_heads linear_num_heads mamba_n_heads mamba_num_heads n_mamba_heads"),
        (
            2,
            "num_key_value_heads num_kv_heads swa_num_key_value_heads n_groups mamba_n_groups "
            "num_global_key_value_heads",
        ),
        (
            2,
            "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k n_group topk_group "
            "first_k_dense_replace",
        ),
        (8, "index_block_size"),
        (2, "index_topk_blocks"),
        (1, "max_window_layers"),
        (2, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers o_groups"),
    )
    for name in names.split()
}
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers")
PARTS_APART = ("vision_config", "audio_config", "vq_config")  # what a text never goes through

MUSIC = {
    "text_encoder": {"model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2},
    "audio_encoder": {"model_type": "encodec"},
    "decoder": {"hidden_size": 32, "ffn_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 257},
}
GEMMA4 = {"per_layer_config": None, "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
ASSISTANT = GEMMA4 | {
    "model_type": "gemma4_text",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "max_position_embeddings": CONTEXT,
}
ASSISTANT.pop("per_layer_config")

INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
INDEXER |= {"indexer_compress_ratio": 4}

# What hangs together in one family alone, or what its config does not say by itself.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "intermediate_size": 64},
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4_unified_assistant": {"text_config": ASSISTANT | {"model_type": "gemma4_unified_text"}},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2, "L_cycles": 1, "L_bp_cycles": [1]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "musicgen": MUSIC,
    "musicgen_melody": MUSIC,
    "nemotron": {"num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 16},  # not the layers' width, as the 350M model has it
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4},
}


def tiny_config(family: str) -> PreTrainedConfig:
    whole = SPECIAL[family] if family.startswith("musicgen") else {}  # whose config names no parts of its own
    config = AutoConfig.for_model(family, **copy.deepcopy(whole))
    return AutoConfig.for_model(family, **_with(shrunk(config), SPECIAL.get(family, {})))


def _with(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """The settings with others in their place, part by part; one that is None there is left out."""
    nested = {k: _with(settings.get(k) or {}, v) if isinstance(v, dict) else v for k, v in more.items()}
    return {name: value for name, value in (settings | nested).items() if value is not None}


def shrunk(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a small config of this kind: those that differ."""
    values, found = config.to_dict(), {}
    for name, value in values.items():
        if isinstance(vars(config).get(name), PreTrainedConfig):
            found[name] = shrunk(vars(config)[name])
        elif name in SIZES and isinstance(value, int) and value > 0:
            found[name] = min(SIZES[name], value)
        elif name == "sliding_window" and value is None:  # published models of a family have one where its config may
            found[name] = SIZES[name]
        elif name == "use_sliding_window":
            found[name] = True
        elif name in ("logits_scaling", "logit_scale"):  # 1 in a config's defaults, and never in a published model
            found[name] = 0.25
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int) and value >= 0:
            found[name] = 0
        elif "drop" in name and isinstance(value, float):
            found[name] = 0.0
    if "kv_lora_rank" in values and "num_key_value_heads" in found:  # keys of all heads come from one latent
        found["num_key_value_heads"] = found["num_attention_heads"]
    depth = next((name for name in DEPTHS if name in values), None)
    if depth is not None:
        found |= shallow(values, depth)
    if "is_decoder" in values:
        found["is_decoder"] = True
    return found


def shallow(values: dict[str, Any], depth: str) -> dict[str, Any]:
    """The first layer of each kind, and at least two: a kind is what the lists of one entry a layer say of it."""
    count = values[depth]
    lists = {name: x for name, x in values.items() if isinstance(x, list) and len(x) == count and count > LAYERS}
    kinds = [tuple(str(x[i]) for x in lists.values()) for i in range(count)]
    kept = sorted({kinds.index(kind) for kind in kinds})
    kept += [i for i in range(count) if i not in kept][: max(LAYERS - len(kept), 0)]
    return {depth: len(kept)} | {name: [x[i] for i in sorted(kept)] for name, x in lists.items()}


@dataclass(frozen=True)
class Outcome:
    family: str
    kind: str  # trained, refused or failed
    why: str = ""  # the sentences that refuse it; of a failure, what went wrong


CPU = torch.device("cpu")
SEQUENCES = tuple(tuple(range(first, first + length)) for first, length in ((5, 43), (50, 9), (60, 9), (90, 31)))
PACKED = pack(SEQUENCES, (21, 4, 4, 15))
TOLERANCE = 2e-3  # nats of a token in fp32; what is wrong is wrong by more, since the weights are large


def walk(family: str, folder: Path) -> Outcome:
    """What becomes of a family. Refused: one message of fastppo's own; all else has to come out right."""
    try:
        save(family, folder)
        config = settings(folder)
        note = planned(config)
        tokenizer = load_actor_tokenizer(config)
        check_models(config, tokenizer)
        actor, critic, reference = load_policies(config, CPU)
        assert critic is not None
        wrong = [*before_learning(actor, reference, folder), *sampled(actor, config, folder)]
        update(actor, critic, config)
        write_model(actor, tokenizer, folder / "actor", config.actor.lora)
        wrong += exported(actor, folder)
        write_critic(critic, tokenizer, folder / "critic", PPOProgress())
        wrong += wrong_values(critic, folder / "critic", PACKED, TOLERANCE)
    except FastPPOError as error:
        text = str(error).replace(str(folder), "the model")
        return Outcome(family, "failed" if "\n" in text or len(text) > LONGEST else "refused", text)
    except Exception:
        return Outcome(family, "failed", traceback.format_exc())
    return Outcome(family, "failed", "; ".join(wrong)) if wrong else Outcome(family, "trained", note)


LONGEST = 600  # characters of a message


def save(family: str, folder: Path) -> None:
    """A random model as a folder; where transformers itself cannot make one, its config alone."""
    config = tiny_config(family)
    tiny.tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config)
    except Exception:  # to be refused: there is no model to be wrong about
        config.save_pretrained(folder)
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)


def settings(folder: Path) -> Config:
    models = ["--actor.model", str(folder), "--rewards", '[{"function": "none:none"}]', "--data.path", "none"]
    sizes = ["--data.max_prompt_tokens", "40", "--sampling.max_new_tokens", "20", "--ppo.microbatch_tokens", "120"]
    return parse([*models, *sizes, "--ppo.batch_size", "8", "--optim.dtype", "fp32"])


def planned(config: Config) -> str:
    """What the planner says of a model that it lets be run without it; nothing of one that it can plan."""
    try:
        for dtype in ("fp32", "bf16"):
            optim = replace(config.optim, dtype=dtype)
            assert make_plan(replace(config, optim=optim), Machine(1, 1, None, 1 << 40)).shares
    except FastPPOError as error:
        if "--plan off" not in str(error):
            raise
        return str(error)
    return ""


def before_learning(actor: Policy, reference: Policy, folder: Path) -> list[str]:
    plain = own_logprobs(folder, PACKED)
    found = {"the actor's": logprobs(actor, PACKED), "the reference's": logprobs(reference, PACKED)}
    return [line for name, values in found.items() for line in off(f"{name} logprobs of packed rows", values, plain)]


def sampled(actor: Policy, config: Config, folder: Path) -> list[str]:
    prompts = Prompts.of([s[: 9 + 20 * (i % 2)] for i, s in enumerate(SEQUENCES)], range(len(SEQUENCES)))
    sampler = InProcess(SamplingWeights(actor, config.zero.stage), config.sampling, stop_ids=[])
    sampler.sync()
    rollout = sampler.sample(prompts, temperature=config.sampling.temperature, seed=1)
    return off("logprobs in decoding", rollout.logprobs, own_logprobs(folder, rollout.packed))


def update(actor: Policy, critic: Critic, config: Config) -> None:
    """One step of PPO on packed rows: the clipped loss on the actor, the value loss on the critic."""
    count = len(PACKED.responses)
    advantages, values = torch.linspace(-1, 1, count), torch.zeros(count)
    old = logprobs(actor, PACKED)
    targets = Targets(PACKED, old, advantages, values, advantages, Totals(count, count, 0), {})
    for role, term in ((actor, clip_term), (critic, value_term)):
        role.train()
        optimizer = torch.optim.SGD([p for p in role.parameters() if p.requires_grad], lr=0.1)
        loss, _ = role(PACKED, partial(_term, term, targets, config))
        loss.backward()
        grads = [p.grad for p in role.parameters() if p.grad is not None]
        assert grads and all(bool(g.isfinite().all()) for g in grads), "a gradient is no number"
        optimizer.step()
    assert not torch.equal(old, logprobs(actor, PACKED)), "the update changed nothing"


def _term(term: Any, targets: Targets, config: Config, role: Any, hidden: Tensor) -> Any:
    return term(role, hidden, targets, config)


def exported(actor: Policy, folder: Path) -> list[str]:
    return off("logprobs of the export, loaded again,", own_logprobs(folder / "actor", PACKED), logprobs(actor, PACKED))


@torch.no_grad()
def logprobs(policy: Policy, packed: Packed) -> Tensor:
    """(M,) of the response tokens, packed."""
    policy.eval()
    return policy(packed, lambda role, hidden: role.head(hidden, ops.linear_logprobs, packed.responses).logprobs)


@torch.no_grad()
def own_logprobs(folder: Path, packed: Packed) -> Tensor:
    """The same by the model's own forward pass on one sequence at a time, as transformers loads and computes it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows = zip(packed.tokens.split(packed.lengths.tolist()), packed.response_lengths.tolist(), strict=True)
    return torch.cat([_own_logprobs(model, tokens, count) for tokens, count in rows])


def _own_logprobs(model: PreTrainedModel, tokens: Tensor, count: int) -> Tensor:
    rows = model(tokens[None], use_cache=False).logits[0, -count - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, tokens[-count:, None])[:, 0]


def off(what: str, found: Tensor, expected: Tensor) -> list[str]:
    error = float((found - expected).abs().max())
    return [] if error <= TOLERANCE else [f"{what} are off by {error:.2g}"]

"""A fifth of transformers' causal families on a run's way, in miniature; `bench/families.py` walks them all."""

import pytest
from families import FAMILIES, walk

pytestmark = pytest.mark.slow

# Families that are refused, each for a reason of its own, and what the message says of it.
REASONS = {
    "bart": "does not take all its attention from transformers' AttentionInterface",
    "bert": "its outputs are not those of a linear head on its last states",
    "dbrx": "computes keys of (2, 8) and values of (2, 8) (heads, width), and the sampling cache has (1, 8)",
    "deepseek_v3": "values of width 8 and queries of width 16, as multi-head latent attention does",
    "deepseek_v32": "raises TypeError ('NoneType' object is not subscriptable) in modeling_deepseek_v32.py",
    "diffllama": "decoding token by token differs from the whole pass, from layer 0 on",
    "emu3": "Unrecognized configuration class",
    "gemma3n": "requires the timm library",
    "gemma4_text": "head_dim differs from layer to layer",
    "gpt_oss": "asks its attention for s_aux",
    "hrm_text": "cannot be trained here",
    "jamba": "AttentionInterface",
    "jetmoe": "and the sampling cache has (2, 8), as the config says",
    "llama4_text": "has no backbone that can be called without its vocabulary head",
    "mamba": "AttentionInterface",
    "musicgen": "Multiple valid text configs were found",
    "nemotron": "does not pass its keyword arguments on to its layers",
    "reformer": "AttentionInterface",
    "xlm": "AttentionInterface",
}
# Families that are trained and of which each needed something: experts, keys that layers share, another width of the
# head, one sequence alone in a row, soft caps, positions that are learned, a norm with a bias.
TRAINED = ("afmoe", "gemma3n_text", "gemma2", "gpt2", "llama", "mixtral", "olmoe", "opt", "phi", "qwen2_moe", "qwen3")
# The rest by lot, whatever becomes of them.
OTHERS = tuple(family for family in FAMILIES[4::20] if family not in {*REASONS, *TRAINED})


@pytest.mark.parametrize("family", TRAINED)
def test_a_family_is_trained_and_its_export_says_the_same(family, tmp_path):
    outcome = walk(family, tmp_path / family)
    assert outcome.kind == "trained" and not outcome.why, outcome.why


@pytest.mark.parametrize("family", REASONS)
def test_a_family_that_cannot_be_trained_is_refused_with_the_true_reason(family, tmp_path):
    outcome = walk(family, tmp_path / family)
    assert outcome.kind == "refused" and REASONS[family] in outcome.why, outcome.why


@pytest.mark.parametrize("family", OTHERS)
def test_there_is_no_third_way(family, tmp_path):
    outcome = walk(family, tmp_path / family)
    assert outcome.kind in ("trained", "refused"), outcome.why


def test_a_fifth_of_all_families_is_here():
    assert len({*REASONS, *TRAINED, *OTHERS}) >= len(FAMILIES) / 5

"""What a run leaves behind: the trained actor as a Hugging Face directory."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from fastppo.attention import ATTENTION
from fastppo.models import Policy

log = logging.getLogger("fastppo")


def export(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the actor and its tokenizer so that `AutoModelForCausalLM.from_pretrained(folder)` loads them.

    A shared critic's value head is no part of a language model and stays behind.
    """
    model = policy.model
    model.set_attn_implementation("sdpa")  # ours is known in this process alone
    try:
        model.save_pretrained(folder)
    finally:
        model.set_attn_implementation(ATTENTION)
    tokenizer.save_pretrained(folder)
    log.info("the trained actor is in %s", folder)

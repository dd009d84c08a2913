"""Small models that stand for large ones in the check of packed rows."""

import logging

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastppo.models.loading.miniature import miniature
from fastppo.models.loading.model_check import check_model
from fastppo.models.loading.weights import without_dropout
from fastppo.models.roles import ModelError

CPU = torch.device("cpu")


def small(config, auto=AutoModelForCausalLM):
    return miniature(auto, config, torch.float32, CPU)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_family_at_its_published_size_has_a_small_model_that_passes_the_check(family):
    config = without_dropout(AutoConfig.for_model(family))
    model = small(config)
    assert type(model).__name__ in config.architectures if config.architectures else True
    assert model.num_parameters() < 20_000_000
    check_model(model)


def test_each_kind_of_layer_is_kept():
    kinds = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 6
    model = small(AutoConfig.for_model("gemma2", layer_types=kinds, num_hidden_layers=12))
    assert model.config.layer_types == kinds[:6] and len(model.model.layers) == 6


def test_a_classifier_has_a_small_one_too():
    config = AutoConfig.for_model("llama", num_labels=1, pad_token_id=3)
    check_model(small(config, AutoModelForSequenceClassification))


def test_a_model_that_packing_would_change_is_refused_by_its_small_one():
    with pytest.raises(ModelError, match="outputs are not those of a linear head"):
        check_model(small(AutoConfig.for_model("bert", is_decoder=True)))  # whose head is more than a product


def test_widths_of_one_head_stay_since_rotary_scales_come_as_lists_of_it():
    scales = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48, "rope_theta": 1e4}
    check_model(small(AutoConfig.for_model("phi3", rope_parameters=scales)))


class Rigid:
    @staticmethod
    def from_config(config, **settings):
        if config.hidden_size != 48:
            raise ValueError("48 is my width")
        return AutoModelForCausalLM.from_config(config, **settings)


def test_a_model_whose_widths_cannot_change_is_only_made_shallow_and_the_log_says_so(caplog):
    caplog.set_level(logging.INFO, logger="fastppo")
    model = small(AutoConfig.for_model("llama", hidden_size=48, num_attention_heads=6, vocab_size=101), Rigid)
    assert model.config.hidden_size == 48 and len(model.model.layers) == 2
    assert "LlamaConfig: no model can be made with fewer heads" in caplog.text and "48 is my" in caplog.text


def test_random_numbers_and_the_config_stay_as_they_were():
    config = AutoConfig.for_model("llama")
    before, state = config.to_dict(), torch.get_rng_state()
    small(config)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)

"""Noise in a forward pass: wherever a model keeps its rate, it is found and switched off."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes.models.dropout import rates, switch_off, switch_on

SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
SIZES |= {"bos_token_id": None, "eos_token_id": 1}
LLAMA = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}

NOISY = {
    "gpt2": SIZES | {"resid_pdrop": 0.5},  # a layer
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.5},  # a number in a layer
    "xglm": SIZES | {"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64, "activation_dropout": 0.5},
    "biogpt": SIZES | {"intermediate_size": 64, "hidden_dropout_prob": 0.5},
    "llama": LLAMA | {"attention_dropout": 0.5},
    "mixtral": LLAMA | {"num_local_experts": 4, "router_jitter_noise": 0.5},
    "phimoe": LLAMA | {"num_local_experts": 4, "input_jitter_noise": 0.5},
    "falcon": SIZES | {"hidden_dropout": 0.5},  # read from the configuration at every call
    "gptj": SIZES | {"rotary_dim": 8, "attn_pdrop": 0.5},
}  # fmt: skip


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize(("architecture", "settings"), NOISY.items())
def test_noise_of_any_kind_is_found_switched_off_and_put_back(architecture, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).train()
    config = model.config.to_dict()
    assert not torch.equal(logits_of(model), logits_of(model))
    found = switch_off(model)
    assert not list(rates(model)) and torch.equal(logits_of(model), logits_of(model))
    switch_on(found)
    assert model.config.to_dict() == config and not torch.equal(logits_of(model), logits_of(model))


def test_a_wrapper_whose_config_is_a_dictionary_is_searched_too():
    """As DeepSpeed's engine, around the reference."""
    wrapper = torch.nn.Sequential(torch.nn.Dropout(0.3))
    wrapper.config = {"zero_optimization": {"stage": 2}}
    assert len(switch_off(wrapper)) == 1 and wrapper[0].p == 0.0

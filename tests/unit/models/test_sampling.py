"""Sampling from every kind of architecture: with keys and values, with convolutions and states, without any cache."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes.models.forward import completion_logits, pad_batch
from rlhf_recipes.models.sampling import sample_completions

SIZES = {
    "vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
MAMBA_2 = {"mamba_d_state": 8, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 1}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}

KINDS = {
    "llama": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},  # no position ids
    "falcon": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    "mixtral": {"num_local_experts": 4},
    "gemma3_text": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
    "mamba": {"state_size": 8, "time_step_rank": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR | EXPERTS,
    "falcon_h1": MAMBA_2 | {"mamba_d_ssm": 32},
    "bamba": MAMBA_2 | {"attn_layer_indices": [1]},
    "nemotron_h": {"mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                   "layers_block_type": ["mamba", "attention"]},
    "openai-gpt": {},  # no cache
}  # fmt: skip
PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14], [20], [4, 5, 6], [7, 7, 8], [9], [33, 34]]


def tiny(architecture: str, **settings):
    torch.manual_seed(0)
    known = (
        AutoConfig.for_model(architecture).to_dict().keys() | AutoConfig.for_model(architecture).attribute_map.keys()
    )
    sizes = {name: value for name, value in SIZES.items() if name in known and name not in settings}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes | settings)).eval()


@pytest.mark.parametrize(("architecture", "settings"), KINDS.items())
def test_a_sampled_token_is_the_one_that_the_whole_text_gives(architecture, settings, monkeypatch):
    """Greedy sampling with padding, while completions end at different lengths, against one pass over each text."""
    monkeypatch.setattr("rlhf_recipes.models.sampling._draw", lambda logits, temperature: logits.argmax(-1))
    model, ends = tiny(architecture, **settings), list(range(1, 24))
    completions = sample_completions(model, PROMPTS, 0, 8, 1.0, ends)
    assert len({len(ids) for ids in completions}) > 1  # some rows leave the batch before others
    ids, mask, _ = pad_batch(PROMPTS, completions, 0)
    with torch.no_grad():
        padded, _ = completion_logits(model, ids, mask, max(map(len, completions)))
        for i, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == completion
            torch.testing.assert_close(padded[i, : len(completion)], logits, atol=1e-4, rtol=1e-4)

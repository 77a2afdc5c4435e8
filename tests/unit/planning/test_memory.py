"""Memory of a training process: cases computed by hand, models of all kinds, and the peaks of real stages."""

import sys
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from rlhf_recipes.planning.machine import Launch
from rlhf_recipes.planning.memory import REDUCE_BUCKET, Batch, moments
from rlhf_recipes.planning.models import Model, model_of
from rlhf_recipes.planning.trace import Curve, fit
from support.places import ROOT

NOTHING = Curve()

TOY = Model(
    parameters=1000, trained=1000, embeddings=100, head=100, head_trained=True, vocabulary=50, hidden=2, layers=4,
    cache=16, quantized=0, quantized_bytes=0.0, saved=Curve(token=10.0), working=NOTHING, forward=NOTHING,
)  # fmt: skip
"""1000 parameters; layers keep 10 bytes per token."""

CPU = Launch(1, "NO", device="cpu")
GPU = Launch(1, "NO", device="cuda")
HALF_GPU = replace(GPU, mixed_precision="bf16")
ZERO = Launch(4, "DEEPSPEED", 2, "bf16", "cuda")

RLOO = Batch("rloo", rows=2, prompt=3, completion=5, accumulation=2, rollout=4, sampled=4, reference=True)

TINY = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "tie_word_embeddings": False,
    },
    "llama": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "tie_word_embeddings": True,
    },
    "mixtral": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "num_local_experts": 4,
    },
    "qwen3_moe": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "intermediate_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
    },
    "gemma3_text": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "intermediate_size": 64,
    },
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 2},
    "opt": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 64, "word_embed_proj_dim": 32},
}  # fmt: skip


def tiny(architecture, **more):
    return AutoConfig.for_model(architecture, **{"vocab_size": 300} | TINY[architecture] | more)


def test_full_training_in_float32_by_hand():
    # Always: weights 4, reference 4 and Adam 8 bytes per parameter. In the backward pass of the second micro-batch: all
    # gradients, the head's twice, 2 x 8 tokens of 10 bytes, 2 x 5 x 50 logits, and three copies of these.
    found = moments(TOY, RLOO, CPU)
    update = found["update"]
    assert (update.weights, update.reference, update.optimizer, update.buffers) == (4000, 4000, 8000, 0)
    assert update.gradients == 4000 + 400
    assert update.activations == 160
    assert update.logits == 4 * 500 + 3 * 4 * 500
    # Keys and values of 4 x 8 tokens, the keys of one layer of four twice, and 4 x 50 logits with the copies for drawing.
    sampling = found["sampling"]
    assert sampling.gradients == 0
    assert sampling.kv_cache == 4 * 8 * 16 * 4 * (1 + 1 / 8)
    assert sampling.logits == 4 * 50 * (4 + 20)
    assert update.total > sampling.total
    assert update.total == 4000 + 4000 + 8000 + 4400 + 160 + 8000 + update.rollout


def test_one_micro_batch_needs_activations_or_gradients_not_both():
    batch = Batch("reward", rows=2, prompt=8, completion=0)
    update = moments(TOY, batch, CPU)["update"]
    assert (update.gradients, update.activations) == (4400, 0)  # at the end, with a second gradient of the embeddings
    long = moments(TOY, replace(batch, prompt=1000), CPU)["update"]
    assert (long.gradients, long.activations) == (0, 20_000)


def test_ddp_adds_buckets_and_zero_divides():
    batch = replace(RLOO, reference=False)
    alone = moments(TOY, batch, CPU)["update"]
    ddp = moments(TOY, batch, replace(CPU, num_processes=2, distributed_type="MULTI_GPU"))["update"]
    assert ddp.buffers == 4000
    assert ddp.total - alone.total == 4000
    zero = moments(TOY, batch, ZERO)["update"]
    assert zero.weights == 2000  # bf16
    assert zero.optimizer == (4 + 8) * 1000 / 4  # master weights and Adam
    assert zero.gradients == 2 * 1000 / 4
    assert zero.buffers == 2 * REDUCE_BUCKET  # in memory from the beginning of each backward pass
    offloaded = moments(TOY, batch, replace(ZERO, offload=True))["update"]
    assert (offloaded.optimizer, offloaded.gradients) == (0, 0)


def test_autocast_keeps_float32_weights_and_logits_with_their_gradient():
    update = moments(TOY, RLOO, HALF_GPU)["update"]
    assert (update.weights, update.optimizer) == (4000, 8000)
    assert update.logits == 2 * 4 * 500 + 2 * TOY.head + 3 * 4 * 500
    assert moments(TOY, RLOO, HALF_GPU)["sampling"].kv_cache == 4 * 8 * 16 * 2 * (1 + 1 / 8)


def test_sft_goes_through_logits_in_tiles():
    batch = Batch("sft", rows=2, prompt=100, completion=0)
    on_gpu = moments(TOY, batch, GPU)["update"]
    assert on_gpu.logits == 200 * 32768 * 4 + 4 * 200 * TOY.hidden
    on_cpu = moments(TOY, batch, CPU)["update"]
    assert on_cpu.logits == 200 * 50 * 4 * 8.25 + 4 * 200 * TOY.hidden
    # 4096 positions at a time, also for long texts.
    longer = moments(TOY, replace(batch, rows=1000), GPU)["update"]
    assert longer.logits == 4096 * 32768 * 4 + 4 * 100_000 * TOY.hidden


@pytest.mark.parametrize(
    ("optimizer", "device", "expected"),
    [
        ("adamw_torch_fused", "cuda", 8 * 1000),
        ("adamw_8bit", "cuda", 2 * 900 + 8 * 100),  # embeddings stay in 32 bits
        ("paged_adamw_8bit", "cuda", 0),  # leaves the GPU when its memory is short
        ("paged_adamw_8bit", "cpu", 2 * 900 + 8 * 100),
        ("lion_32bit", "cuda", 4 * 1000),
        ("adafactor", "cuda", 0),
    ],
)
def test_states_of_optimizers(optimizer, device, expected):
    peaks = moments(TOY, replace(RLOO, optimizer=optimizer), replace(GPU, device=device))
    assert peaks["update"].optimizer == peaks["sampling"].optimizer == expected


def test_value_network_and_reward_models_count():
    value = replace(TOY, parameters=900, trained=900, head=0, head_trained=False)
    reward_model = replace(TOY, trained=0)
    plain = moments(TOY, RLOO, CPU)["update"]
    more = moments(TOY, RLOO, CPU, value, (reward_model, reward_model))["update"]
    assert more.value_model == 3600
    assert more.reward_models == 2 * 4000  # float32
    assert more.gradients - plain.gradients == 3600
    assert more.optimizer - plain.optimizer == 7200
    assert more.activations == 2 * plain.activations


def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    batch = replace(RLOO, prompt=100, checkpointing=True)
    update = moments(TOY, batch, CPU)["update"]
    inputs = 2 * 105 * TOY.hidden * 4 * (4 + 3)
    assert update.activations == inputs + max(2 * 105 * 10 / 4 - 3 * 4 * 500, 0)


def test_a_curve_through_its_points_is_found_again():
    curve = Curve(fixed=7.0, row=5.0, token=3.0, square=2.0)
    T = 8
    found = fit([curve(1, T), curve(1, 2 * T), curve(1, 4 * T), curve(2, T)], T)
    assert vars(found) == pytest.approx(vars(curve))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TINY)
def test_models_of_all_kinds(architecture):
    config = tiny(architecture)
    real = AutoModelForCausalLM.from_config(config)
    found = model_of(config, CPU)
    assert found.parameters == found.trained == sum(p.numel() for p in real.parameters())
    assert found.head == real.get_output_embeddings().weight.numel()
    assert 0 < found.saved(2, 32) < found.saved(2, 64) < found.saved(4, 64)
    assert 0 < found.forward(2, 64) < found.saved(8, 64)
    assert config.num_hidden_layers == 3  # unchanged


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral"])
def test_autocast_keeps_less_for_each_token(architecture):
    whole, half = (model_of(tiny(architecture), launch) for launch in (GPU, HALF_GPU))
    assert 0.4 * whole.saved.token < half.saved.token < 0.75 * whole.saved.token
    if architecture == "gpt2":  # and a copy of each layer's weights in bf16
        assert half.saved.fixed == pytest.approx(3 * 2 * (12 * 32 * 32 + 13 * 32), rel=0.05)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_cache_is_what_generation_keeps(architecture):
    config = tiny(architecture)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(config)(torch.zeros(2, 7, dtype=torch.long)).past_key_values
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert model_of(config, CPU).cache * 2 * 7 == kept


def test_adapter_has_no_embedding_to_train_and_little_state():
    config = tiny("llama")
    adapted = model_of(
        config, CPU, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    assert adapted.trained == 3 * 4 * (32 + 32 + 32 + 16)  # layers x rank x (in + out) of q (32, 32) and v (32, 16)
    assert not adapted.head_trained
    assert moments(adapted, RLOO, CPU)["update"].gradients == 4 * adapted.trained


@pytest.mark.slow
@pytest.mark.parametrize(("double", "expected"), [(False, 0.5625), (True, 0.5 + 1 / 64 + 4 / 16384)])
def test_four_bits_leave_embeddings_and_head(double, expected):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=double)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    for architecture, of_a_layer in (("gpt2", 12 * 32 * 32), ("llama", 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64)):
        found = model_of(tiny(architecture), CPU, peft_config=lora, quantization_config=quantization)
        assert found.quantized == 3 * of_a_layer
        assert found.quantized_bytes == pytest.approx(expected)
        whole = found.parameters - found.quantized
        assert moments(found, RLOO, CPU)["update"].weights == pytest.approx(4 * whole + expected * found.quantized)


def test_saved_activations_are_those_of_a_real_pass():
    """Autograd's own hooks count the bytes that it keeps for a real model."""
    config = tiny("llama")
    model, kept = AutoModelForCausalLM.from_config(config), {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.zeros(2, 96, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # without padding, transformers makes no mask
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert output.requires_grad
    counted = sum(size for size, _ in kept.values())
    assert model_of(config, CPU).saved(2, 96) == pytest.approx(counted, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [*(pytest.param(case, marks=pytest.mark.nightly) for case in ("small_sft", "small_reward")), "small_ppo"]
)
def test_peaks_of_real_stages(case, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import memory as benchmark

    try:
        assert benchmark.compare(case)["ratio"] == pytest.approx(1.0, abs=0.15)
    finally:
        sys.modules.pop("memory")

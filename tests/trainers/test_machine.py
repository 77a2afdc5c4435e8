"""What a stage makes of the machine it runs on; a GPU is played where there is none."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf_recipes import PPOConfig, PPOTrainer, RLOOTrainer
from rlhf_recipes.models import hardware as machine
from rlhf_recipes.models.start import Start
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.trainers.args import trainer_args
from support.places import ROOT
from support.processes import run_python
from support.ranks import two_ranks
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import word_tokenizer
from support.tiny_trainers import make

GIB = 2**30


def section(trainer=None, **more):
    return SimpleNamespace(trainer=trainer or {}, quantization=None, **more)


@pytest.fixture
def gpu(monkeypatch):
    """Plays a CUDA GPU; returns how to say what it has."""

    def play(bf16: bool = True, flash_attn: bool = False, free: float = 70.0, name: str = "NVIDIA H100"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        # Every GPU of CUDA 11 and later computes bf16 somehow.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * GIB), 80 * GIB))
        monkeypatch.setattr(machine, "is_flash_attn_2_available", lambda: flash_attn)

    return play


def said(caplog):
    (record,) = [record for record in caplog.records if record.name == "rlhf_recipes.models.hardware"]
    assert record.levelname == "INFO"
    return record.getMessage()


@pytest.fixture(autouse=True)
def info(caplog):
    caplog.set_level("INFO", logger="rlhf_recipes.models.hardware")


# Precision


@pytest.mark.parametrize(("bf16", "expected", "why"), [(True, "bf16", "has it"), (False, "fp16", "does not have bf16")])
def test_a_gpu_trains_in_bf16_where_it_is_no_emulation_and_else_in_fp16(bf16, expected, why, gpu, caplog):
    gpu(bf16=bf16, name="Tesla T4")
    values = machine.settings("ppo", section())
    assert (values["bf16"], values["fp16"]) == (expected == "bf16", expected == "fp16")
    assert "use_cpu" not in values
    assert said(caplog).startswith(f"ppo: {expected}: Tesla T4 {why}; ")


def test_a_cpu_trains_in_fp32_also_beside_a_gpu(gpu, caplog):
    if not torch.accelerator.is_available():
        expected = {"bf16": False, "fp16": False, "use_cpu": True, "gradient_checkpointing": False}
        assert machine.settings("sft", section()) == expected | {"dataloader_pin_memory": False}
        caplog.clear()
    gpu()
    values = machine.settings("sft", section({"use_cpu": True}))
    assert values["use_cpu"] and not values["bf16"] and not values["gradient_checkpointing"]
    assert said(caplog).startswith("sft: fp32: on a CPU; ")


@pytest.mark.parametrize(("new_enough", "expected"), [(True, "bf16"), (False, "fp16")])
def test_apples_gpus(new_enough, expected, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: new_enough)
    values = machine.settings("sft", section())
    assert values == {"bf16": new_enough, "fp16": not new_enough, "gradient_checkpointing": True}
    assert said(caplog).startswith(f"sft: {expected}: mps ")


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        ({}, None, "bf16"),
        ({}, "no", "no"),
        ({}, "fp16", "fp16"),
        ({"fp16": True}, "bf16", "fp16"),
        ({"bf16": True}, "no", "bf16"),
        ({"bf16": False}, "bf16", "no"),
        ({"bf16": False, "fp16": True}, None, "fp16"),
        ({"bf16": None}, "fp16", "fp16"),
    ],
)
def test_the_recipe_counts_before_accelerates_configuration_and_that_before_the_hardware(
    given, asked, expected, gpu, caplog
):
    gpu()
    values = machine.settings("ppo", section(given), asked)
    assert (values["bf16"], values["fp16"]) == (expected == "bf16", expected == "fp16")
    own = any(value is not None for value in given.values())
    why = "the recipe says so" if own else "accelerate's mixed_precision" if asked else "NVIDIA H100 has it"
    assert said(caplog).startswith(f"ppo: {'fp32' if expected == 'no' else expected}: {why}; ")


def test_bf16_that_a_gpu_only_emulates_is_refused(gpu):
    gpu(bf16=False, name="Tesla T4")
    for given, asked, key in (({"bf16": True}, None, "ppo.trainer.bf16"), ({}, "bf16", "accelerate's mixed_precision")):
        with pytest.raises(RecipeError, match=f"^{key}: Tesla T4 does not have bf16; take fp16, or float32.$"):
            machine.settings("ppo", section(given), asked)
    assert machine.settings("ppo", section({"bf16": True, "use_cpu": True}))["bf16"]


def test_fp16_on_a_cpu_is_refused_and_bf16_is_not():
    """accelerate would train in float32 and say nothing."""
    for given, asked, key in (
        ({"fp16": True, "use_cpu": True}, None, "sft.trainer.fp16"),
        ({"use_cpu": True}, "fp16", "accelerate's mixed_precision"),
    ):
        with pytest.raises(RecipeError, match=f"^{key}: a CPU does not train in fp16"):
            machine.settings("sft", section(given), asked)
    assert machine.settings("sft", section({"bf16": True, "use_cpu": True}))["bf16"]
    with pytest.raises(RecipeError, match="^accelerate's mixed_precision is fp8; take bf16, fp16 or no.$"):
        machine.settings("sft", section({"use_cpu": True}), "fp8")


@pytest.mark.slow
def test_bf16_on_a_cpu_trains_in_bf16(policy_folder, tmp_path):
    trainer = make(PPOTrainer, policy_folder, tmp_path, bf16=True)
    seen = set()
    trainer.model.lm_head.register_forward_hook(lambda layer, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}


def test_a_stages_arguments_follow(tmp_path):
    def args(*overrides):
        recipe = load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", "ppo.trainer.use_cpu=true", *overrides])
        return trainer_args(Run(recipe, "ppo"), PPOConfig)

    assert (args().bf16, args("ppo.trainer.bf16=true").bf16) == (False, True)
    assert (args().gradient_checkpointing, args("ppo.trainer.gradient_checkpointing=true").gradient_checkpointing) == (
        False,
        True,
    )
    with pytest.raises(RecipeError, match=r"^ppo.trainer.fp16: a CPU"):
        args("ppo.policy=nobody/knows-it", "ppo.trainer.fp16=true")


# Gradient checkpointing


@pytest.mark.parametrize(
    ("given", "expected", "why"),
    [
        ({}, True, "on: the default on a GPU; rlhf-recipes plan says whether it fits without, which is faster"),
        ({"gradient_checkpointing": True}, None, "on: the recipe says so"),
        ({"gradient_checkpointing": False}, None, "off: the recipe says so"),
        ({"activation_checkpointing": True}, None, "on: the recipe says so"),
    ],
)
def test_checkpointing_on_a_gpu(given, expected, why, gpu, caplog):
    gpu()
    values = machine.settings("ppo", section(given))
    assert values.get("gradient_checkpointing") is expected
    assert said(caplog).endswith(f"gradient checkpointing {why}")


def test_weights_that_the_recipe_wants_in_another_dtype_are_said(caplog):
    machine.settings("ppo", section({"model_init_kwargs": {"dtype": "bfloat16"}}))
    assert said(caplog).startswith(
        "ppo: fp32: on a CPU, but of weights in bfloat16, as the recipe says; attention sdpa"
    )


def test_a_recipes_checkpointing_on_a_cpu_is_the_recipes(caplog):
    assert "gradient_checkpointing" not in machine.settings("ppo", section({"gradient_checkpointing": True}))
    assert said(caplog).endswith("gradient checkpointing on: the recipe says so")


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("trainer_class", "value_model"), [(RLOOTrainer, None), (PPOTrainer, "shared"), (PPOTrainer, "policy")]
)
def test_sampling_keeps_the_cache_where_training_is_checkpointed(
    trainer_class, value_model, lora, policy_folder, tmp_path
):
    peft_config = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    trainer = make(
        trainer_class, policy_folder, tmp_path, value_model=value_model, max_steps=2,
        peft_config=peft_config if lora else None, gradient_checkpointing=True, num_iterations=2,
    )  # fmt: skip
    policy = trainer.model.get_base_model() if lora else trainer.model
    sampled, trained, layers = [], [], []

    def look(model, args, kwargs):
        if torch.is_grad_enabled():
            trained.append(kwargs["use_cache"])
        elif kwargs["use_cache"]:
            sampled.append((kwargs["past_key_values"] is not None, kwargs["input_ids"].shape[1]))

    policy.register_forward_pre_hook(look, with_kwargs=True)
    policy.transformer.h[0].register_forward_hook(
        lambda layer, args, output: layers.append(1) if torch.is_grad_enabled() else None
    )
    trainer.train()
    assert sampled[0][0] is False and len(sampled) == 6
    assert sampled[1:] == [(True, 1)] * 5
    assert trained == [False, False]
    assert len(layers) == 2  # inside of a checkpoint there is no gradient in the first pass: these are the second ones


# Attention


@pytest.mark.parametrize(
    ("played", "given", "expected", "line"),
    [
        ({"flash_attn": True}, {}, "flash_attention_2", "flash_attention_2, where the model has it: flash-attn is ins"),
        ({}, {}, None, "sdpa, where the model has it: flash-attn is not installed"),
        (
            {"flash_attn": True},
            {"bf16": False},
            None,
            "sdpa, where the model has it: flash-attn does not compute in fp",
        ),
        ({"flash_attn": True, "bf16": False}, {}, None, "sdpa, where the model has it: flash-attn does not run on NVI"),
        ({"flash_attn": True}, {"use_cpu": True}, None, "sdpa, where the model has it: flash-attn needs a CUDA GPU"),
        (
            {"flash_attn": True},
            {"model_init_kwargs": {"attn_implementation": "eager"}},
            "eager",
            "eager: the recipe says so",
        ),
    ],
)
def test_attention(played, given, expected, line, gpu, caplog, policy_folder, tmp_path):
    gpu(**played)
    values = machine.settings("rloo", section(given)) | given
    assert f"; attention {line}" in said(caplog)
    args = SimpleNamespace(
        bf16=values["bf16"], fp16=values["fp16"], use_cpu=values.get("use_cpu", False), seed=0,
        model_init_kwargs=given.get("model_init_kwargs"),
    )  # fmt: skip
    run = Run(load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", f"rloo.policy={policy_folder}"]), "rloo")
    Start(run, args, "policy").arguments()
    assert args.model_init_kwargs.get("attn_implementation") == expected


def test_attention_follows_the_models_support(gpu):
    gpu(flash_attn=True)
    args = SimpleNamespace(bf16=True, fp16=False, use_cpu=False)
    flash = {"attn_implementation": "flash_attention_2"}
    assert machine.attention(args, AutoModelForCausalLM, AutoConfig.for_model("llama")) == flash
    assert machine.attention(args, AutoModelForCausalLM, AutoConfig.for_model("bloom")) == {}
    assert machine.attention(args, AutoModelForSequenceClassification, AutoConfig.for_model("deberta-v2")) == {}


# DDP's search for unused parameters


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 40,
    "pad_token_id": 0,
    "num_labels": 1,
}

KEY_VALUE_HEADS = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "smollm3", "stablelm")

OWN_SIZES = {name: {"num_key_value_heads": 2} for name in KEY_VALUE_HEADS} | {
    "gemma": {"head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 1},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
    "falcon": {"num_kv_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gptj": {"rotary_dim": 8},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    # As DeBERTa v3 has them.
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 8,
        "type_vocab_size": 0,
    },
}


def without_gradient(auto_class, model_type):
    """Names of parameters that have none after one pass."""
    model = auto_class.from_config(AutoConfig.for_model(model_type, **SIZES | OWN_SIZES.get(model_type, {}))).train()
    ids = torch.randint(1, 40, (4, 6))
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("model_type", sorted(machine.ALL_TRAINED))
def test_every_weight_of_these_models_has_a_gradient(model_type):
    assert without_gradient(AutoModelForSequenceClassification, model_type) == []
    if model_type not in ("albert", "bert", "deberta-v2", "distilbert", "electra", "roberta"):
        assert without_gradient(AutoModelForCausalLM, model_type) == []


def test_not_every_model_is_one_of_these():
    assert without_gradient(AutoModelForSequenceClassification, "esm") != []
    assert not {"esm", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"} & machine.ALL_TRAINED


@pytest.mark.parametrize(
    ("model_type", "own", "expected"),
    [("llama", None, False), ("llama", True, True), ("mixtral", None, True)],
)
def test_the_search_is_left_out_where_it_finds_nothing(model_type, own, expected, tmp_path):
    tokenizer = word_tokenizer()
    sizes = SIZES | {"num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    trainer = make(RLOOTrainer, model, tmp_path, tokenizer=tokenizer, ddp_find_unused_parameters=own)
    machine.expect_all_gradients(trainer)
    assert trainer.accelerator.ddp_handler.find_unused_parameters is expected


def stage_trainers(policy: Path, folder: Path, **settings):
    """A function that makes a trainer, by name, for every kind of training."""
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    settings |= {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05}
    on_policy = settings | {"per_device_train_batch_size": 4, "beta": 0.1}
    ppo = on_policy | {"value_warmup_steps": 1}
    others = settings | {"per_device_train_batch_size": 2, "save_strategy": "no", "report_to": [], "use_cpu": True}
    others |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
    tokenizer = word_tokenizer()
    texts = [row["text"] for row in REVIEWS]

    def sft():
        data, args = Dataset.from_dict({"text": texts}), SFTConfig(str(folder / "sft"), **others)
        return SFTTrainer(str(policy), args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)

    def reward():
        torch.manual_seed(0)
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        bert = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **SIZES | sizes))
        data = Dataset.from_dict({"chosen": texts[:15], "rejected": texts[15:]})
        args = RewardConfig(str(folder / "reward"), **others)
        return RewardTrainer(bert, args=args, train_dataset=data, processing_class=tokenizer)

    return {
        "rloo": lambda: make(RLOOTrainer, policy, folder / "rloo", **on_policy),
        "ppo-shared": lambda: make(PPOTrainer, policy, folder / "ppo", value_model="shared", **ppo),
        "ppo-separate-lora": lambda: make(
            PPOTrainer, policy, folder / "separate", value_model="policy", peft_config=lora, **ppo
        ),
        "sft-lora": sft,
        "reward": reward,
    }


SEARCHED = "from here on with the search"


def train_each(rank: int, folder: Path, policy: Path) -> None:
    found = {}
    for search in (None, True):
        if search:
            print(SEARCHED, flush=True)
        for name, made in stage_trainers(policy, folder, ddp_find_unused_parameters=search).items():
            trainer = made()
            machine.expect_all_gradients(trainer)
            trainer.train()
            found[name, search] = trainer.model_wrapped.find_unused_parameters, dict(trainer.model.state_dict())
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.mark.slow
def test_without_the_search_training_is_the_same_and_no_rank_is_warned(policy_folder, tmp_path):
    codes, outputs = two_ranks(train_each, tmp_path, policy_folder, seconds=240)
    assert codes == [0, 0], outputs
    for output in outputs:
        without, _, with_it = output.partition(SEARCHED)
        assert "find_unused_parameters" not in without
        assert "find_unused_parameters=True was specified" in with_it
    found = torch.load(tmp_path / "found-0.pt")
    assert len(found) == 10
    for name, search in found:
        searched, weights = found[name, search]
        assert searched is bool(search)
        for key, tensor in weights.items():
            torch.testing.assert_close(tensor, found[name, True][1][key], rtol=0, atol=1e-6, msg=f"{name}: {key}")


@pytest.mark.slow
@pytest.mark.cold  # the launcher's command line says that precision was asked for; a forked one has none
def test_a_stage_on_two_processes_says_what_it_chose_and_torch_warns_of_nothing(bpe_policy_folder, tmp_path):
    (tmp_path / "imdb").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "imdb" / f"{split}.jsonl", REVIEWS)
    done = run_python(
        "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_ddp_2.yaml", "-m",
        "rlhf_recipes.ppo", "--recipe", "imdb_positive", f"ppo.policy={bpe_policy_folder}", "ppo.value_model=policy",
        "reward_funcs=[{name: length}]", f"runs_dir={tmp_path / 'runs'}",
        "ppo.trainer={per_device_train_batch_size: 4, max_completion_length: 6}", "episodes=24",
        f"data.path={tmp_path / 'imdb'}", "data.prompt_tokens=[2, 4]", cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr
    log = (tmp_path / "runs" / "imdb_positive" / "ppo" / "log.txt").read_text()
    chosen = [line for line in log.splitlines() if "INFO rlhf_recipes.models.hardware: " in line]
    assert len(chosen) == 1
    assert chosen[0].endswith(
        "ppo: fp32: accelerate's mixed_precision; attention sdpa, where the model has it: flash-attn needs a CUDA GPU; "
        "gradient checkpointing off: it trades time for a GPU's memory"
    )

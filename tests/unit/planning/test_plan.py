"""Plans of recipes: shipped recipes, machines, changes that make a stage fit, steps and tokens, and errors."""

import dataclasses
import json
import re
import shlex
import time

import pytest
from transformers import AutoConfig
from trl import RewardConfig, SFTConfig

from rlhf_recipes import PPOConfig, RLOOConfig
from rlhf_recipes.planning.architectures import ARCHITECTURES, config_of
from rlhf_recipes.planning.changes import smallest_change
from rlhf_recipes.planning.machine import GIB, launch_of, machine_of
from rlhf_recipes.planning.plan import run_plan
from rlhf_recipes.planning.stage import plan_stage, settings_of
from rlhf_recipes.recipe.load import load_recipe, recipe_files
from rlhf_recipes.recipe.schema import TRAINED, RecipeError
from support.processes import cli
from support.texts import write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

PUBLISHED = {
    # Numbers of their cards and papers; tied parameters count once.
    "openai-community/gpt2": 124_439_808,
    "distilbert/distilgpt2": 81_912_576,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "EleutherAI/pythia-160m-deduped": 162_322_944,
    "EleutherAI/pythia-410m-deduped": 405_334_016,
    "EleutherAI/pythia-1b-deduped": 1_011_781_632,
    "EleutherAI/pythia-1.4b-deduped": 1_414_647_808,
    "EleutherAI/pythia-2.8b-deduped": 2_775_208_960,
    "EleutherAI/pythia-6.9b-deduped": 6_857_302_016,
    "distilbert/distilbert-base-uncased": 66_362_880,
    "distilbert/distilbert-base-cased": 65_190_912,
    "microsoft/deberta-v3-base": 183_831_552,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
}


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A folder with a tiny model, rows, and a function that makes a recipe of stages."""
    monkeypatch.chdir(tmp_path)
    tokenizer = word_tokenizer()
    save_pair(tmp_path / "model", causal_lm(tokenizer, "llama", num_key_value_heads=1), tokenizer)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "the film was good"}])

    def make(**sections) -> str:
        values = {"name": "r", "description": "d", "data": {"path": "rows.jsonl"}, "reward_funcs": [{"name": "length"}]}
        (tmp_path / "r.yaml").write_text(json.dumps(values | sections), encoding="utf-8")
        return "r.yaml"

    return make


def planned(name, stage, gpu, *overrides, accelerate_config=None):
    machine = machine_of(gpu)
    return plan_stage(load_recipe(name, overrides), stage, machine, launch_of(machine, accelerate_config))


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_architectures_have_the_published_number_of_parameters(name, count):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(**ARCHITECTURES[name])
    auto = AutoModel if config.model_type in ("distilbert", "deberta-v2") else AutoModelForCausalLM
    with torch.device("meta"):
        assert sum(p.numel() for p in auto.from_config(config).parameters()) == count


def test_architectures_hold_every_hub_model_of_the_recipes(hub_cache):
    names = [name for name in recipe_files() if not name.startswith("_")]
    assert len(names) > 10
    for name in names:
        recipe = load_recipe(name)
        for stage in TRAINED:
            if (section := getattr(recipe, stage)) is not None:
                key = "policy" if stage in ("ppo", "rloo") else "model"
                assert config_of(recipe, f"{stage}.{key}", getattr(section, key) or "stage:sft")[0].vocab_size > 100


HARDWARE = {
    # `about.hardware` of recipes, up to the bracket -> the same as `--gpu` and `--accelerate-config`.
    r"2 CPU cores, (\d+) GB": (r"cpu-\1", None),
    r"one (\d+) GB GPU": (r"\1", None),
    r"one H200": ("1xH200", None),
    r"8xH100, ZeRO-2, bf16": ("8xH100", "zero2_8xh100"),
    r"8xH100, ZeRO-2 with the optimizer on the CPU, bf16": ("8xH100", "zero2_offload"),
}


@pytest.mark.slow
@pytest.mark.nightly  # 40 s; other tests plan single recipes
def test_every_shipped_recipe_fits_the_hardware_that_it_names(hub_cache):
    files = {name: path for name, path in recipe_files().items() if not name.startswith("_")}
    assert len(files) > 10
    for name in files:
        said = load_recipe(name).about.hardware.partition(" (")[0]
        gpu, config = next(
            (re.sub(form, gpu, said), config) for form, (gpu, config) in HARDWARE.items() if re.fullmatch(form, said)
        )
        for stage in TRAINED:
            if getattr(load_recipe(name), stage) is not None:
                plan = planned(name, stage, gpu, accelerate_config=config)
                assert plan.fits, f"{name}: {stage} needs {plan.total / GIB:.1f} GB, and about.hardware says {said}"


@pytest.mark.parametrize(
    ("text", "count", "gigabytes", "device"),
    [
        ("8xH100-80", 8, 80, "cuda"),
        ("1xRTX3060-12", 1, 12, "cuda"),
        ("2x24", 2, 24, "cuda"),
        ("H100", 1, 80, "cuda"),
        ("4xa100", 4, 80, "cuda"),
        ("A100-40", 1, 40, "cuda"),
        ("my card-7.5", 1, 7.5, "cuda"),
        ("24", 1, 24, "cuda"),
        ("2xcpu-16", 2, 16, "cpu"),
    ],
)
def test_machines(text, count, gigabytes, device):
    machine = machine_of(text)
    assert (machine.count, machine.bytes / GIB, machine.device) == (count, gigabytes, device)


@pytest.mark.parametrize("text", ["", "8x", "XYZ", "0xH100", "H100-", "80GB", "2x", "-12", "24-0"])
def test_an_unknown_machine_is_one_sentence_with_the_forms(text):
    with pytest.raises(RecipeError, match="8xH100-80, 1xRTX3060-12, 2x24"):
        machine_of(text)


def test_accelerate_configurations():
    machine = machine_of("8xH100")
    assert launch_of(machine, None).zero_stage is None and str(launch_of(machine, None)) == "8 processes with DDP"
    zero = launch_of(machine, "zero2_8xh100")
    assert (zero.zero_stage, zero.num_processes, zero.weight_bytes, zero.autocast) == (2, 8, 2, False)
    with pytest.raises(RecipeError, match="no accelerate configuration named 'nonsense'"):
        launch_of(machine, "nonsense")


def test_zero_3_is_refused(tmp_path):
    file = tmp_path / "z.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config: {zero_stage: 3}\n", encoding="utf-8"
    )
    with pytest.raises(RecipeError, match="plan has no formulas for DeepSpeed ZeRO-3"):
        launch_of(machine_of("8xH100"), str(file))


@pytest.mark.parametrize(
    ("stage", "config_class"), [("sft", SFTConfig), ("reward", RewardConfig), ("rloo", RLOOConfig), ("ppo", PPOConfig)]
)
def test_settings_have_the_defaults_of_the_trainer(stage, config_class):
    given = getattr(load_recipe("imdb_tiny"), stage).trainer
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    settings = settings_of(load_recipe("imdb_tiny"), stage, 1)
    filled_in = settings.keys() - given.keys()
    assert "optim" in filled_in
    assert {name: settings[name] for name in filled_in} == {name: defaults[name] for name in filled_in}


@pytest.mark.slow
def test_a_stage_is_planned_from_what_earlier_ones_start_from(local):
    name = local(
        sft={"scratch": {"architecture": "gpt2", "config": {"n_layer": 2, "n_embd": 32, "n_head": 2}, "vocabulary": 500}},
        reward={}, ppo={"value_model": "stage:reward"}, rloo={},
    )  # fmt: skip
    parameters = 500 * 32 + 1024 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 2 * 32
    for stage in ("sft", "ppo", "rloo"):
        update = planned(name, stage, "cpu-8").moments["update"]
        assert update.weights == 4 * parameters
        assert update.reference == (4 * parameters if stage != "sft" else 0)
    assert planned(name, "reward", "cpu-8").moments["update"].weights == 4 * (parameters + 32)
    assert planned(name, "ppo", "cpu-8").moments["update"].value_model == 4 * (parameters + 32)


def test_an_adapter_as_policy_goes_on_or_is_merged(local, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    parameters = sum(p.numel() for p in base.parameters())
    base.config._name_or_path = str(tmp_path / "model")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained("adapter")
    name = local(rloo={"policy": "adapter", "trainer": {"max_completion_length": 16}})
    merged = planned(name, "rloo", "cpu-8").moments["update"]
    assert merged.weights == merged.reference == 4 * parameters
    further = planned(name, "rloo", "cpu-8", "rloo.peft={}").moments["update"]
    assert further.weights == 4 * (parameters + 2 * 2 * (32 + 32))
    assert further.reference == 0


def test_a_missing_model_is_one_sentence(local, hub_cache):
    name = local(rloo={"policy": "someone/unknown"})
    with pytest.raises(RecipeError, match=r"rloo.policy: plan needs the config.json of someone/unknown.*local folder"):
        planned(name, "rloo", "24")
    with pytest.raises(RecipeError, match="rloo.policy: ./nothing: no such folder"):
        planned(name, "rloo", "24", "rloo.policy=./nothing")
    with pytest.raises(RecipeError, match="recipe r has no stage sft"):
        planned(name, "rloo", "24", "rloo.policy=stage:sft")


def test_a_model_is_planned_before_it_is_fetched(local, monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path))
    for model, hidden in (("smollm2", 576), ("minilm", 384)):
        recipe = load_recipe(local(rloo={"policy": f"fetched:{model}"}))
        assert config_of(recipe, "rloo.policy", recipe.rloo.policy)[0].hidden_size == hidden


def test_without_network_a_hub_model_is_refused_at_once(local, hub_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(RecipeError, match="neither here nor on the Hub"):
        planned(local(rloo={"policy": "someone/unknown"}), "rloo", "24")
    assert time.monotonic() - start < 10  # huggingface_hub alone: half a minute


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "rloo.policy=microsoft/deberta-v3-base",
            "rloo.policy: microsoft/deberta-v3-base cannot be used: .*DebertaV2Config.*AutoModelForCausalLM",
        ),
        ("sft.model=stage:reward", "(sft|reward).model: stage:.* starts from a model that is made from it"),
        ("rloo.trainer.per_device_train_batch_size=0", r"per_device_train_batch_size: must be in \[1, inf\), not 0"),
        ("rloo.trainer.sampling_batch_size=0", r"sampling_batch_size: must be in \[1, inf\), not 0"),
        ("rloo.trainer.max_completion_length=null", "max_completion_length: must be above 0, not null"),
        ("rloo.trainer.max_completion_length=64", "max_completion_length is 64, but the model reads 64 tokens"),
        ("rloo.trainer.num_generations=3", "num_generations .3.: the 8 completions of a rollout"),
        (
            "rloo.trainer.generation_batch_size=12",
            "rloo.trainer.generation_batch_size .12. must be divisible by .*8. x processes .1.",
        ),
        (
            "rloo.trainer={gradient_accumulation_steps: 2, steps_per_generation: 3}",
            "rloo.trainer.steps_per_generation .3. must be a multiple of gradient_accumulation_steps .2.",
        ),
    ],
)
def test_stages_that_cannot_run_are_not_planned(local, override, expected):
    trainer = {"max_completion_length": 16, "per_device_train_batch_size": 8}
    name = local(sft={"model": "model"}, reward={}, rloo={"trainer": trainer})
    with pytest.raises(RecipeError, match=expected):
        planned(name, "rloo", "24", override)


def test_global_batch_is_shared_by_the_processes_of_the_configuration(local, capsys):
    trainer = {"max_completion_length": 16, "per_device_train_batch_size": 8, "generation_batch_size": 128}
    name = local(rloo={"policy": "model", "global_batch_size": 64, "trainer": trainer}, episodes=256)
    for gpu, accumulation, rollout in (("24", 8, 128), ("4x24", 2, 32), ("16x24", 1, 8)):
        plan = planned(name, "rloo", gpu)
        assert (plan.batch.accumulation, plan.batch.rollout, plan.work.steps) == (accumulation, rollout, 4)
        assert plan.batch.rows == min(8, 64 // plan.machine.count)
    with pytest.raises(RecipeError, match="rloo.global_batch_size: 64 cannot be divided by 3 processes"):
        planned(name, "rloo", "3x24")
    run_plan(name, [], "24", "zero2_8xh100", None)
    assert "8 x GPU, 24 GB each" in capsys.readouterr().out


def test_sampling_in_parts_needs_keys_and_values_of_a_part(local):
    name = local(rloo={"policy": "model", "trainer": {"max_completion_length": 16, "gradient_accumulation_steps": 8}})
    whole, part, more = (
        planned(name, "rloo", "24", *(f"rloo.trainer.sampling_batch_size={n}" for n in given))
        for given in ((), (16,), (1000,))
    )
    assert (whole.batch.sampled, part.batch.sampled, more.batch.sampled) == (64, 16, 64)
    assert part.moments["sampling"].kv_cache == whole.moments["sampling"].kv_cache / 4
    assert part.moments["update"] == whole.moments["update"]


def test_reward_models_count_at_their_precision(local):
    name = local(rloo={"policy": "model", "trainer": {"max_completion_length": 16}})
    given = (
        f"reward_funcs=[{{name: reward_model, args: {{model: model{more}}}}}]" for more in ("", ", dtype: bfloat16")
    )
    whole, half = (planned(name, "rloo", "24", override).moments["update"].reward_models for override in given)
    assert whole == 2 * half > 0


@pytest.mark.parametrize(
    ("stage", "overrides", "rows", "steps", "tokens"),
    [
        # 3 rollouts of 8 x 2 completions, each 8 prompt tokens at most and 16 new ones; 2 passes of 2 steps.
        (
            "rloo",
            ("episodes=40", "rloo.trainer.steps_per_generation=2", "rloo.trainer.num_iterations=2"),
            48,
            12,
            48 * 24,
        ),
        ("rloo", ("rloo.trainer.max_steps=5",), 40, 5, 40 * 24),
        ("rloo", (), None, None, None),
        ("sft", ("sft.trainer.max_steps=5",), 40, 5, 40 * 64),  # the model's context is 64
        ("sft", ("data.max_rows=20", "sft.trainer.num_train_epochs=2"), 40, 6, 40 * 64),
        ("sft", (), None, None, None),
        ("reward", ("reward.pairs=16", "reward.trainer.num_train_epochs=1"), 16, 2, 2 * 16 * 64),
    ],
)
def test_work(local, stage, overrides, rows, steps, tokens):
    name = local(
        sft={"model": "model"},
        reward={"model": "model"},
        rloo={"policy": "model", "trainer": {"max_completion_length": 16}},
    )
    work = planned(name, stage, "cpu-8", f"{stage}.trainer.per_device_train_batch_size=8", *overrides).work
    assert (work.rows, work.steps, work.tokens) == (rows, steps, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage", "gpu", "overrides", "expected"),
    [
        ("imdb_12gb", "sft", "4", ["sft.trainer.gradient_checkpointing=false"], "gradient_checkpointing=true"),
        ("imdb_positive", "sft", "2.6", [], "optim=paged_adamw_8bit"),
        ("imdb_positive", "rloo", "4", [], ""),
        ("imdb_negative", "sft", "2", [], ""),
    ],
)
def test_a_proposed_change_makes_the_stage_fit(name, stage, gpu, overrides, expected):
    plan = planned(name, stage, gpu, *overrides)
    assert not plan.fits
    change = smallest_change(name, overrides, plan, None, gpu)
    assert change is not None
    assert expected in str(change)
    fixed = planned(name, stage, gpu, *overrides, *change.overrides, accelerate_config=change.accelerate_config)
    assert fixed.fits
    before, after = (settings_of(load_recipe(name, [*overrides, *more]), stage, 1) for more in ((), change.overrides))
    for kept in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        assert isinstance(after[kept], int)
    batch = [s["per_device_train_batch_size"] * s["gradient_accumulation_steps"] for s in (before, after)]
    assert batch[0] == batch[1]  # rows of an optimizer step
    assert fixed.batch.rollout == plan.batch.rollout


@pytest.mark.slow
def test_a_printed_change_can_be_pasted_into_a_shell(capsys):
    assert not run_plan("imdb_positive", ["ppo.trainer.optim=adamw_8bit"], "1.55", None, None)
    fixes = [line.split("fits with: ")[1] for line in capsys.readouterr().out.splitlines() if "fits with: " in line]
    assert fixes
    for fix in fixes:
        words = shlex.split(fix)
        config = words[1] if words[0] == "--accelerate-config" else None
        overrides = words[2:] if config else words
        stage = overrides[0].partition(".")[0]
        assert planned("imdb_positive", stage, "1.55", *overrides, accelerate_config=config).fits
    assert any("{" in fix for fix in fixes)  # a shell would split it


def test_the_first_proposed_change_is_a_smaller_sampling_batch():
    plan = planned("tldr_1b_lora", "rloo", "24", "rloo.trainer.sampling_batch_size=512")
    assert not plan.fits
    change = smallest_change("tldr_1b_lora", ["rloo.trainer.sampling_batch_size=512"], plan, None, "24")
    assert str(change) == "rloo.trainer.sampling_batch_size=128"


@pytest.mark.slow
def test_nothing_makes_it_fit():
    plan = planned("tldr_6.9b", "rloo", "2")
    assert smallest_change("tldr_6.9b", [], plan, None, "2") is None


def test_plan_advises_to_turn_gradient_checkpointing_off_if_the_stage_fits_without_it(capsys):
    roomy, tight = (planned("imdb_12gb", "sft", gpu) for gpu in ("24", "5"))
    assert roomy.batch.checkpointing and roomy.total == tight.total < roomy.otherwise
    assert (roomy.fits_without, tight.fits_without) == (True, False)
    without = planned("imdb_12gb", "sft", "24", "sft.trainer.gradient_checkpointing=false")
    assert without.total == roomy.otherwise and not without.fits_without and without.fits
    run_plan("imdb_12gb", [], "24", None, None)
    assert "and is faster: sft.trainer.gradient_checkpointing=false" in capsys.readouterr().out


def test_output(capsys):
    assert run_plan("imdb_tiny", [], "1xRTX3060-12", None, 2.0)
    out = capsys.readouterr().out
    for words in ("imdb_tiny on 1 x RTX3060, 12 GB each", "optimizer", "KV cache", "headroom", "ppo      fits"):
        assert words in out
    assert "128 steps, 4,096 episodes, at most 90,112 tokens" in out
    assert "34 min, by --throughput" in out  # 4096 / 2 s


def test_time_of_an_earlier_run(local, tmp_path, capsys):
    name = local(rloo={"policy": "model", "trainer": {"max_completion_length": 16}}, episodes=4800)
    run = tmp_path / "runs" / "r" / "rloo"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"status": "finished"}', encoding="utf-8")
    write_jsonl(
        run / "metrics.jsonl", [{"step": 1, "episodes_per_second": 8.0}, {"step": 2, "episodes_per_second": 4.0}]
    )
    run_plan(name, [], "cpu-8", None, None)
    assert "10 min to 20 min, by the run here" in capsys.readouterr().out


def test_time_of_an_earlier_run_is_by_its_own_batches_and_processes(local, tmp_path, capsys):
    name = local(
        sft={"model": "model", "trainer": {"per_device_train_batch_size": 4}},
        data={"path": "rows.jsonl", "max_rows": 960},
    )
    run = tmp_path / "runs" / "r" / "sft"
    run.mkdir(parents=True)
    (run / "manifest.json").write_text('{"status": "finished", "setup": {"num_processes": 2}}', encoding="utf-8")
    (run / "recipe.yaml").write_text((tmp_path / name).read_text(encoding="utf-8"), encoding="utf-8")
    write_jsonl(run / "metrics.jsonl", [{"step": step, "seconds": float(step), "loss": 1.0} for step in (10, 20)])
    run_plan(
        name, ["sft.trainer.per_device_train_batch_size=32", "sft.trainer.num_train_epochs=1"], "cpu-8", None, None
    )
    assert "by the run here (8 to 8 texts/s)" in capsys.readouterr().out  # 1 step of 2 x 4 a second


@pytest.mark.slow
def test_command(tmp_path):
    """That exit code 1 says what does not fit is tested with the accelerate configurations."""
    done = cli("plan", "imdb_tiny", "--gpu", "XYZ", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_model_that_cannot_run_without_weights_is_one_sentence(local, tmp_path):
    AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=2, vocab_size=100).save_pretrained(tmp_path / "ssm")
    file = local(rloo={"policy": "./ssm", "trainer": {"max_steps": 1}})
    with pytest.raises(
        RecipeError, match="^rloo: plan cannot run one of its models without weights .*; the stage itself may run[.]$"
    ):
        run_plan(file, [], "1x24", None, None)

"""LoRA and 4-bit in all four stages: what is trained, what its folder holds, and that every reader gets it back."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from rlhf_recipes import stage as entry
from rlhf_recipes.models.limits import check_context
from rlhf_recipes.models.load import load_config, load_model
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.functions import reward_model, sentiment
from rlhf_recipes.runs import inputs as hub
from support.adapted import LORA, NF4, WIDTHS, logits
from support.tiny_models import causal_lm, save_pair, word_tokenizer

KINDS = [pytest.param({"peft": LORA}, id="lora"), pytest.param({"peft": LORA, "quantization": NF4}, id="nf4")]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def quantized(section: dict, *whole: str) -> dict:
    """What a reader passes to see the weights that training saw, all but `whole` quantized."""
    settings = NF4 | ({"llm_int8_skip_modules": list(whole)} if whole else {})
    return {"quantization_config": BitsAndBytesConfig(**settings)} if "quantization" in section else {}


def assert_starts_at_the_reference(folder: Path) -> None:
    first = lines(folder)[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["kl_k3"] == pytest.approx(0, abs=1e-6)
    assert first["ratio"] == pytest.approx(1, abs=1e-5) and first["clip_fraction"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("section", KINDS)
@pytest.mark.parametrize("architecture", list(WIDTHS))
def test_sft_saves_an_adapter_that_plain_transformers_loads(architecture, section, models, run, trained):
    base = models[architecture]
    folder = run("sft", {"sft": {"model": str(base), **section}})
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "manifest.json"} <= files
    assert not files & {"model.safetensors", "training_args.bin", ".final", "ref"}
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    expected = logits(trained["sft"].model)
    plain = AutoModelForCausalLM.from_pretrained(folder, **quantized(section))
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert not torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(base, **quantized(section))), expected, atol=1e-3
    )
    merged = load_model(AutoModelForCausalLM, "model", str(folder), dtype="float32")
    assert torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(folder)), atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.slow
@pytest.mark.parametrize("section", KINDS)
@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("gpt_neox", {"score"}),
        ("distilbert", {"pre_classifier", "classifier"}),
        ("deberta-v2", {"pooler", "classifier"}),
    ],
)
def test_a_reward_models_head_is_trained_and_comes_back(architecture, head, section, models, run, trained):
    folder = run("reward", {"reward": {"model": str(models[architecture]), **section}})
    saved = load_file(folder / "adapter_model.safetensors")
    whole = {name.split(".")[2] for name in saved if "lora_" not in name}
    assert whole == head
    in_optimizer = {id(p) for group in trained["reward"].optimizer.param_groups for p in group["params"]}
    parts = [p for n, p in trained["reward"].model.named_parameters() if ".modules_to_save.default." in n]
    originals = [p for n, p in trained["reward"].model.named_parameters() if ".original_module." in n]
    assert parts and all(id(part) in in_optimizer for part in parts)
    assert any(not torch.equal(part, first) for part, first in zip(parts, originals, strict=True))
    expected = logits(trained["reward"].model)
    assert expected.shape == (1, 1)
    trained["reward"].model.config.pad_token_id = None
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, **quantized(section, *head))
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    merged = load_model(AutoModelForSequenceClassification, "model", str(folder), dtype="float32")
    unquantized = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert torch.allclose(logits(merged), logits(unquantized), atol=1e-5)
    score = reward_model(str(folder))
    values = score(["the film"], ["was great"], completion_ids=[[5, 6]], finished=[True])
    assert len(values) == 1 and abs(values[0]) < 100


def test_sentiment_reads_a_classifiers_adapter(classifier_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder)
    adapter = LoraConfig(task_type="SEQ_CLS", target_modules=["q_lin"], lora_alpha=4000, init_lora_weights=False)
    adapted = get_peft_model(model, adapter)
    adapted.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(classifier_folder).save_pretrained(tmp_path)
    read = {"prompts": [""] * 2, "completions": ["the film was great", "i hated it"]}
    own, base = (sentiment(str(folder), "NEGATIVE")(**read) for folder in (tmp_path, classifier_folder))
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    adapted.eval()
    with torch.no_grad():
        expected = [adapted(**tokenizer(text, return_tensors="pt")).logits[0, 0].item() for text in read["completions"]]
    assert own == pytest.approx(expected, abs=1e-5) and own != pytest.approx(base, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("section", KINDS)
def test_the_whole_chain_on_adapters(section, models, run, trained, tmp_path):
    """Supervised, reward model on its merged layers, PPO and RLOO that go on with its adapter, and their comparison."""
    sections = {
        "sft": {"model": str(models["llama"]), **section},
        "reward": section,
        "ppo": {"value_model": "shared", **section, "peft": {"r": 4, "target_modules": "all-linear"}},
        "rloo": {"policy": "stage:ppo", **section, "peft": {}},
        "eval": {"num_prompts": 4, "models": {"sft": "stage:sft", "ppo": "stage:ppo", "rloo": "stage:rloo"}},
    }
    scored = [{"name": "reward_model", "args": {"model": "stage:reward"}}]
    sft = run("sft", sections)
    reward = run("reward", sections)
    merged = load_model(AutoModelForCausalLM, "model", str(sft), dtype="float32")
    backbone = AutoModelForSequenceClassification.from_pretrained(reward / "base")
    assert backbone.num_labels == 1
    for name, parameter in backbone.base_model.named_parameters():
        assert torch.equal(parameter, merged.base_model.get_parameter(name)), name
    before = load_file(sft / "adapter_model.safetensors")
    for stage, start in (("ppo", before), ("rloo", None)):
        folder = run(stage, sections, reward_funcs=scored)
        assert_starts_at_the_reference(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (
            config["r"] == 4
            and config["lora_alpha"] == 16
            and config["base_model_name_or_path"] == str(models["llama"])
        )
        after = load_file(folder / "adapter_model.safetensors")
        start = load_file(folder.parent / "ppo" / "adapter_model.safetensors") if start is None else start
        assert after.keys() == start.keys() and any(not torch.equal(after[name], start[name]) for name in after)
        assert not (folder / "ref").exists()
        expected = logits(trained[stage].model)
        plain = AutoModelForCausalLM.from_pretrained(folder, **quantized(section))
        assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert (folder.parent / "ppo" / "value_model" / "value_head.safetensors").is_file()
    assert not any(p.requires_grad and ".ref." in n for n, p in trained["ppo"].model.named_parameters())
    measured = json.loads((run("eval", sections, reward_funcs=scored) / "eval.json").read_text())["models"]
    assert measured["sft"]["kl"] == pytest.approx(0, abs=1e-5) and set(measured) == {"sft", "ppo", "rloo"}
    # Moved to another place, the reward model still finds its base.
    shutil.move(reward, tmp_path / "elsewhere")
    moved = load_model(AutoModelForSequenceClassification, "model", str(tmp_path / "elsewhere"))
    assert moved.num_labels == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ppo", "rloo"])
@pytest.mark.parametrize("section", KINDS)
def test_without_peft_the_adapter_is_merged_and_everything_trained(section, stage, models, run, trained):
    sections = {"sft": {"model": str(models["gpt2"]), **section}, stage: {"trainer": {"learning_rate": 1e-3}}}
    start = logits(load_model(AutoModelForCausalLM, "model", str(run("sft", sections)), dtype="float32"))
    folder = run(stage, sections)
    assert_starts_at_the_reference(folder)
    assert torch.allclose(logits(trained[stage].ref_model), start, atol=1e-5)
    assert (folder / "model.safetensors").is_file() and not (folder / "adapter_config.json").exists()
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(trained[stage].model), atol=1e-5)
    assert not torch.allclose(logits(trained[stage].model), start, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("section", KINDS)
@pytest.mark.parametrize("value_model", ["shared", "policy", "stage:reward"])
@pytest.mark.parametrize("continued", [False, True])
def test_ppo_on_an_adapter_with_every_value_network(continued, value_model, section, models, run, trained):
    """Policy, reference and shared value head are one base; the value network is trained, saved and a whole model."""
    sections = {"sft": {"model": str(models["gpt_neox"]), **section}, "reward": {**section}}
    sections["ppo"] = {
        "policy": "stage:sft" if continued else str(models["gpt_neox"]),
        "value_model": value_model,
        **section,
    }
    run("sft", sections)
    if value_model == "stage:reward":
        run("reward", sections)
    folder = run("ppo", sections)
    assert_starts_at_the_reference(folder)
    trainer = trained["ppo"]
    assert trainer.ref_model is None
    of_base = [p for n, p in trainer.model.named_parameters() if "dense_h_to_4h" in n and "lora_" not in n]
    values = trainer.value_network
    own = [] if value_model == "shared" else [p for n, p in values.named_parameters() if "dense_h_to_4h" in n]
    assert len(of_base) == 2 * 2 + len(own)  # weight and bias of two layers, once
    if "quantization" in section:
        assert {p.dtype for n, p in trainer.model.named_parameters() if "dense_h_to_4h.base_layer.weight" in n} == {
            torch.uint8
        }
    assert all(p.requires_grad and p.dtype == torch.float32 for p in values.parameters())
    if value_model == "shared":
        head = load_file(folder / "value_model" / "value_head.safetensors")
        assert torch.equal(head["head.weight"], values.head.weight) and values.head.weight.abs().sum() > 0
    else:
        saved = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
        trained_network = dict(values.model.named_parameters())
        assert all(torch.equal(p, trained_network[n]) for n, p in saved.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "rloo"])
def test_one_4_bit_base_is_in_memory(stage, continued, models, run, trained):
    """Policy, reference and shared value head read the same 4-bit storages; nothing else holds the base's layers."""
    start = "model" if stage in ("sft", "reward") else "policy"
    section = {"peft": LORA, "quantization": NF4, start: str(models["llama"])}
    if continued:
        first = run("sft", {"sft": {"peft": LORA, "quantization": NF4, "model": str(models["llama"])}}, name="first")
        trained.clear()
        section[start] = str(first)
    run(stage, {stage: section})
    trainer = trained[stage]
    assert getattr(trainer, "ref_model", None) is None
    gc.collect()
    shape = AutoModelForCausalLM.from_pretrained(models["llama"])
    layers = [part for name, part in shape.model.named_modules() if isinstance(part, torch.nn.Linear)]
    found = [part for part in gc.get_objects() if isinstance(part, Params4bit)]
    storages = {part.data.untyped_storage().data_ptr(): part.data.untyped_storage().nbytes() for part in found}
    assert sum(storages.values()) == sum(part.weight.numel() for part in layers) / 2  # two weights a byte
    of_trainer = [p for p in trainer.model.parameters() if isinstance(p, Params4bit)]
    assert len(of_trainer) == len(layers) and {p.data.untyped_storage().data_ptr() for p in of_trainer} == set(storages)
    assert all(p.quant_state.nested and p.quant_state.quant_type == "nf4" for p in of_trainer)
    whole = [p for p in trainer.model.parameters() if p.dtype == torch.float32 and p.numel() >= 64 * 64]
    assert not whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "optim"), [("sft", "adamw_8bit"), ("rloo", "paged_adamw_8bit"), ("ppo", "paged_adamw_32bit")]
)
def test_8_bit_and_paged_optimizers_run_and_resume_exactly(stage, optim, models, run, trained):
    section = {"trainer": {"optim": optim, "max_steps": 4, "save_steps": 1, "save_total_limit": 9}}
    section |= {"model" if stage == "sft" else "policy": str(models["gpt2"])}
    folder = run(stage, {stage: section})
    weights = {n: p.detach().clone() for n, p in trained[stage].model.named_parameters()}
    before = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    assert all(not torch.equal(p, weights[n]) for n, p in before.named_parameters())
    states = trained[stage].optimizer.state
    quantized = {p for p, state in states.items() if state["state1"].dtype == torch.uint8}
    assert len(states) == len(weights) and bool(quantized) == optim.endswith("8bit")
    run(stage, {stage: section}, folder / "checkpoint-2", name="again")
    for name, parameter in trained[stage].model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


@pytest.mark.slow
def test_8_bit_weights_train_on_a_cpu(models, run, trained):
    section = {"policy": str(models["llama"]), "peft": LORA, "quantization": {"load_in_8bit": True}}
    folder = run("rloo", {"rloo": section})
    assert_starts_at_the_reference(folder)
    eight = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    reloaded, base = (AutoModelForCausalLM.from_pretrained(path, **eight) for path in (folder, models["llama"]))
    assert torch.allclose(logits(reloaded), logits(trained["rloo"].model), atol=1e-3)
    assert not torch.allclose(logits(reloaded), logits(base), atol=1e-3)


@pytest.mark.slow
def test_an_adapter_on_4_bit_learns_at_small_learning_rates(models, run, trained):
    """In bf16, as TRL has it, a step of 1e-6 would be rounded away."""
    trainer = {"learning_rate": 1e-6, "lr_scheduler_type": "constant"}
    section = {"policy": str(models["gpt2"]), "peft": LORA | {"init_lora_weights": "gaussian"}, "quantization": NF4}
    run("rloo", {"rloo": section | {"trainer": trainer | {"max_steps": 3}}})
    adapter = {n: p for n, p in trained["rloo"].model.named_parameters() if "lora_" in n}
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert any(0 < p.abs().max() < 1e-5 for n, p in adapter.items() if "lora_B" in n)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_4_bit_run_resumes_exactly(stage, models, run, trained, tmp_path):
    section = {"peft": LORA, "quantization": NF4, "trainer": {"max_steps": 4, "save_steps": 1, "save_total_limit": 9}}
    section |= {"model": str(models["gpt2"])} if stage == "sft" else {"policy": str(models["gpt2"])}
    folder = run(stage, {stage: section})
    whole = {n: p.detach().clone() for n, p in trained[stage].model.named_parameters()}
    run(stage, {stage: section}, folder / "checkpoint-2", name="again")
    for name, parameter in trained[stage].model.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_target_modules_that_match_nothing_name_those_that_exist(models, run):
    def refused(peft, stage="sft", architecture="gpt2"):
        with pytest.raises(RecipeError) as caught:
            run(stage, {stage: {"model": str(models[architecture]), "peft": peft}}, name=f"n{abs(hash(str(peft)))}")
        return str(caught.value)

    assert "sft.peft.target_modules" in (said := refused({"target_modules": ["q_proj"]}))
    assert "'q_proj' matches no layer of" in said and "it has: c_attn, c_fc, c_proj, lm_head, wpe, wte." in said
    assert "'c_atn' matches no layer" in refused({"target_modules": ["c_fc", "c_atn"]})
    assert "'.*q_proj' matches no layer" in refused({"target_modules": ".*q_proj"})
    assert "sft.peft.target_modules: '(c_fc': missing )" in refused({"target_modules": "(c_fc"})
    assert "sft.peft.modules_to_save" in (said := refused({"modules_to_save": ["head"]}))
    assert "has no layer 'head'; it has: c_attn" in said
    said = refused({"target_modules": ["c_attn"]}, "reward", "distilbert")
    assert "reward.peft.target_modules" in said and "q_lin" in said
    assert "sft.peft" in refused({"r": 0})
    assert "sft.peft.lora_alpha is 0" in refused({"lora_alpha": 0})
    assert "sft.peft.target_parameters: " in (said := refused({"target_parameters": ["mlp.up.weight"]}))
    assert "has no parameter 'mlp.up.weight'" in said


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 25], "25 is no token of .*; its tokens are 0 to 24"),
        ([-1], "-1 is no token of"),
        ([], "no token is named"),
        ({"embed_tokens": [5, 500]}, "500 is no token of"),
        ({"lm_head": [5]}, "lm_head is the output layer"),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_tokens_that_the_vocabulary_does_not_have_cannot_be_trained(stage, tokens, expected, models, run):
    start = {"sft": "model", "rloo": "policy"}[stage]
    with pytest.raises(RecipeError, match=f"{stage}.peft.trainable_token_indices: {expected}"):
        run(stage, {stage: {start: str(models["llama"]), "peft": {"trainable_token_indices": tokens}}})


@pytest.mark.slow
@pytest.mark.parametrize("key", ["target_modules", "trainable_token_indices", "modules_to_save"])
def test_embeddings_can_be_adapted_but_not_those_that_are_the_output_too(key, models, run, trained):
    def peft(name):
        return {key: [5, 7] if key == "trainable_token_indices" else [name]}

    folder = run("sft", {"sft": {"model": str(models["llama"]), "peft": peft("embed_tokens")}})
    before, after = (load_model(AutoModelForCausalLM, "model", str(path)) for path in (models["llama"], folder))
    assert torch.allclose(logits(after), logits(trained["sft"].model), atol=1e-5)
    assert not torch.equal(after.get_input_embeddings().weight, before.get_input_embeddings().weight)
    tied = {"sft": {"model": str(models["gpt2"]), "peft": peft("wte")}}
    if key == "modules_to_save":
        assert torch.allclose(
            logits(load_model(AutoModelForCausalLM, "model", str(run("sft", tied, name="tied")))),
            logits(trained["sft"].model),
            atol=1e-5,
        )
    else:
        with pytest.raises(RecipeError, match=f"sft.peft.{key}: transformer.wte of .* is its output layer too"):
            run("sft", tied, name="tied")


def test_an_adapter_with_a_part_of_its_bases_weights_is_refused(models, run, tmp_path):
    from peft import LoraConfig, get_peft_model

    def section(init):
        return {"model": str(models["llama"]), "peft": {"init_lora_weights": init}}

    with pytest.raises(RecipeError, match="sft.peft.init_lora_weights: pissa moves a part of"):
        run("sft", {"sft": section("pissa")})
    with pytest.raises(RecipeError, match="sft.peft.init_lora_weights: mica .* not quantized"):
        run("sft", {"sft": section("mica") | {"quantization": NF4}})
    model = AutoModelForCausalLM.from_pretrained(models["llama"])
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights="olora")).save_pretrained(
        tmp_path / "olora"
    )
    word_tokenizer().save_pretrained(tmp_path / "olora")
    with pytest.raises(RecipeError, match=r"rloo.policy: .*init_lora_weights: olora.*without rloo.peft"):
        run("rloo", {"rloo": {"policy": str(tmp_path / "olora"), "peft": {}}})


@pytest.mark.slow
def test_a_layer_that_is_trained_whole_on_4_bit_starts_as_it_was(models, run):
    peft = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert_starts_at_the_reference(
        run("rloo", {"rloo": {"policy": str(models["llama"]), "peft": peft, "quantization": NF4}})
    )


def test_a_tokenizer_with_more_tokens_than_the_model_cannot_be_adapted(models, run, tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["one", "more"])
    shutil.copytree(models["gpt2"], tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for stage in ("sft", "reward"):
        with pytest.raises(
            RecipeError, match=rf"{stage}.model: the tokenizer has 27 tokens .*, the model 25, .*\(no peft\)"
        ):
            run(stage, {stage: {"model": str(tmp_path / "gpt2"), "peft": {}}})


@pytest.mark.slow
def test_going_on_with_an_adapter_under_other_settings_is_refused(models, run):
    sections = {"sft": {"model": str(models["gpt2"]), "peft": {"r": 4}}}
    run("sft", sections)
    with pytest.raises(RecipeError, match=r"ppo.peft.r is 8, but the adapter stage:sft, .* has 4; set it to that"):
        run("ppo", sections | {"ppo": {"peft": {"r": 8}}})
    with pytest.raises(RecipeError, match=r"rloo.peft.target_modules is \['c_fc'\], but .* has \['c_attn'\]"):
        run("rloo", sections | {"rloo": {"peft": {"r": 4, "target_modules": ["c_fc"]}}})
    with pytest.raises(RecipeError, match=r"rloo.trainer.sync_ref_model: rloo.policy is an adapter"):
        run("rloo", sections | {"rloo": {"trainer": {"sync_ref_model": True}}}, name="tiny")


def test_4_bit_without_bitsandbytes_stops_before_any_model_is_looked_for(monkeypatch, capsys, reviews_file, tmp_path):
    def looked_for(*arguments):
        raise AssertionError("a model was looked for")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "name: r\ndescription: d\ndata: {path: reviews.jsonl}\nreward_funcs: [{name: length}]\n"
        "sft: {model: nobody/knows-it, peft: {}, quantization: {load_in_4bit: true}}\n"
    )
    monkeypatch.setattr(entry, "check_references", looked_for)
    monkeypatch.setattr(entry.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    assert entry.run_stage("sft", looked_for, "r.yaml", [], False) == entry.USER_ERROR
    said = capsys.readouterr().err
    assert said == "error: sft.quantization: bitsandbytes is not installed: pip install 'rlhf-recipes[quantization]'\n"


@pytest.mark.slow
def test_an_adapters_context_is_its_bases(models, run):
    from datasets import Dataset

    folder = str(run("sft", {"sft": {"model": str(models["gpt2"]), "peft": LORA}}))
    recipe = load_recipe(f"{folder}/recipe.yaml")
    prompts = Dataset.from_dict({"prompt": ["the film was"]})
    check_context(recipe, "ppo.policy", folder, prompts, word_tokenizer(), 61)
    with pytest.raises(RecipeError, match="more than the 64 of"):
        check_context(recipe, "ppo.policy", folder, prompts, word_tokenizer(), 62)


@pytest.mark.slow
def test_an_adapter_finds_its_base_where_the_recipes_folder_was_moved_to(models, run, trained, tmp_path):
    """Also that of the stage which it goes on from; a base with another id is not taken."""
    sections = {
        "sft": {"model": str(models["gpt2"])},
        "ppo": {"peft": LORA},
        "rloo": {"policy": "stage:ppo", "peft": {}},
    }
    for stage in sections:
        run(stage, sections)
    expected = logits(trained["rloo"].model)
    shutil.move("runs", "elsewhere")
    with pytest.raises(OSError, match="runs"):
        AutoModelForCausalLM.from_pretrained("elsewhere/tiny/rloo")
    moved = load_model(AutoModelForCausalLM, "model", "elsewhere/tiny/rloo")
    assert torch.allclose(logits(moved), expected, atol=1e-5)
    folder = run("rloo", {"rloo": {"policy": "elsewhere/tiny/ppo", "peft": {}}}, name="more")
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "elsewhere" / "tiny" / "sft")
    manifest = Path("elsewhere/tiny/sft/manifest.json")
    manifest.write_text(manifest.read_text().replace('"id": "', '"id": "x'))
    with pytest.raises(RecipeError, match="is an adapter of the model .*, which does not exist"):
        load_model(AutoModelForCausalLM, "model", "elsewhere/tiny/rloo")


def test_an_adapter_whose_base_is_gone(policy_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    shutil.copytree(policy_folder, tmp_path / "base-model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base-model")
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).save_pretrained(
        tmp_path / "lora"
    )
    assert load_config("policy", str(tmp_path / "lora")).model_type == "gpt2"
    shutil.rmtree(tmp_path / "base-model")
    with pytest.raises(
        RecipeError, match="ppo.policy: .*lora is an adapter of the model .*base-model, which does not exist"
    ):
        load_model(AutoModelForCausalLM, "ppo.policy", str(tmp_path / "lora"))


@pytest.fixture
def adapter(tmp_path, models):
    """Makes a random adapter for one model, which says that it belongs to another."""
    from peft import LoraConfig, get_peft_model

    def adapter(of: Path, base: Path, **settings) -> str:
        model = AutoModelForCausalLM.from_pretrained(of)
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False} | settings)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
        return str(tmp_path / "adapter")

    return adapter


@pytest.mark.parametrize("peft", [{}, {"peft": {}}], ids=["merged", "continued"])
@pytest.mark.parametrize("stage", ["ppo", "rloo"])
def test_an_adapter_for_another_base_stops_with_one_sentence(stage, peft, models, run, adapter, tmp_path):
    def refused(folder):
        with pytest.raises(RecipeError) as caught:
            run(stage, {stage: {"policy": folder, **peft}}, name=f"n{len(list(tmp_path.glob('runs/*')))}")
        assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{stage}.policy: ")
        return str(caught.value)

    tokenizer = word_tokenizer()
    wide, deep = {"hidden_size": 128, "intermediate_size": 128}, {"n_embd": 64, "n_layer": 3}
    save_pair(tmp_path / "wide", causal_lm(tokenizer, "llama", **wide), tokenizer)
    save_pair(tmp_path / "deep", causal_lm(tokenizer, "gpt2", **deep), tokenizer)
    more = word_tokenizer()
    more.add_tokens(["one", "more"])
    save_pair(tmp_path / "more", causal_lm(more, "llama", **WIDTHS["llama"]), more)
    q_proj = {"target_modules": ["q_proj"]}
    said = refused(adapter(tmp_path / "wide", models["llama"], **q_proj))
    assert f"does not fit its base {models['llama']}: " in said and "size mismatch for " in said and "[8, 128]" in said
    said = refused(adapter(models["llama"], tmp_path / "more", modules_to_save=["embed_tokens"], **q_proj))
    assert "does not fit" in said and "[25, 64]" in said and "[27, 64]" in said
    assert "'q_proj'" in refused(adapter(models["llama"], models["gpt2"], **q_proj))
    said = refused(adapter(tmp_path / "deep", models["gpt2"], target_modules=["c_attn"]))
    assert "the base has no base_model.model.transformer.h.2.attn.c_attn.lora_A.weight" in said
    said = refused(adapter(models["gpt2"], tmp_path / "deep", target_modules=["c_attn"]))
    assert "the adapter has no base_model.model.transformer.h.2.attn.c_attn.lora_A.weight" in said
    folder = Path(adapter(models["gpt2"], models["gpt2"], target_modules=["c_attn"]))
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:300])
    assert "header" in refused(str(folder))


def test_an_adapter_of_prompts_is_refused(models, run, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    save_pair(tmp_path / "prompts", get_peft_model(model, config), word_tokenizer())
    with pytest.raises(RecipeError, match="rloo.policy: .* is a PROMPT_TUNING adapter, which cannot be merged"):
        run("rloo", {"rloo": {"policy": str(tmp_path / "prompts")}})


@pytest.mark.parametrize("section", [{}, {"peft": {}}, {"peft": {}, "quantization": NF4}], ids=["full", "lora", "nf4"])
def test_training_from_stored_quantized_weights_is_refused(section, models, run, adapter, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"], quantization_config=BitsAndBytesConfig(**NF4))
    save_pair(tmp_path / "stored", model, word_tokenizer())
    start = adapter(models["gpt2"], tmp_path / "stored", target_modules=["c_attn"])
    for stage, key, folder in (("sft", "model", tmp_path / "stored"), ("rloo", "policy", start)):
        with pytest.raises(RecipeError, match=rf"{stage}.{key}: the weights of .* stored quantized \(bitsandbytes\)"):
            run(stage, {stage: {key: str(folder), **section}})
    with pytest.raises(RecipeError, match="eval.models.x: .* is an adapter of .*stored, whose weights are stored quan"):
        load_model(AutoModelForCausalLM, "eval.models.x", start)
    if not section:
        with pytest.raises(RecipeError, match="value_model: the weights of .* are stored quantized"):
            run("ppo", {"ppo": {"policy": str(models["gpt2"]), "value_model": str(tmp_path / "stored")}})


def test_an_adapter_that_does_not_fit_its_base_is_refused(policy_folder, models, tmp_path):
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"])).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    more = {name.replace(".h.0.", ".h.7."): tensor.clone() for name, tensor in weights.items() if ".h.0." in name}
    save_file(weights | more, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match="does not fit its base .*: the base has no .*h.7.attn"):
        load_model(AutoModelForCausalLM, "ppo.policy", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("section", [{}, {"peft": {"target_modules": ["c_attn"]}}], ids=["full", "lora"])
def test_a_models_own_code_runs_only_where_the_recipe_names_it(section, own_code, run):
    folder, mark = own_code
    sections = {"rloo": {"policy": str(folder), **section}}
    with pytest.raises(RecipeError, match=r"rloo.policy: .*Python code of its own.* trust_remote_code"):
        run("rloo", sections)
    with pytest.raises(RecipeError, match="trust_remote_code"):
        run("rloo", sections, trust_remote_code=["another/model"])
    with pytest.raises(RecipeError, match="trust_remote_code"):
        load_model(AutoModelForCausalLM, "eval.models.x", str(folder))
    with pytest.raises(RecipeError, match="trust_remote_code"):
        reward_model(str(folder))
    with pytest.raises(RecipeError, match="trust_remote_code"):
        run("rloo", {"rloo": sections["rloo"] | {"trainer": {"model_init_kwargs": {"trust_remote_code": True}}}})
    assert not mark.exists()
    assert (run("rloo", sections, trust_remote_code=[str(folder)]) / "manifest.json").is_file()
    assert mark.exists()


@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_pickled_weights_are_not_loaded(stage, policy_folder, tmp_path, run):
    folder = tmp_path / "pickled"
    shutil.copytree(policy_folder, folder)
    (folder / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(policy_folder).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        RecipeError, match=f"{stage}.{'model' if stage == 'sft' else 'policy'}: .*no weights in safetensors"
    ):
        run(stage, {stage: {"model" if stage == "sft" else "policy": str(folder)}})
    with pytest.raises(RecipeError, match="eval.models.x: .*no file named model.safetensors"):
        load_model(AutoModelForCausalLM, "eval.models.x", str(folder))

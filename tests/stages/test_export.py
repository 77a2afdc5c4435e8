"""Exports: plain transformers loads them, stages start from them, and there is never half of one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf_recipes.deploy import export
from rlhf_recipes.deploy.export import export_run
from rlhf_recipes.models.load import load_model
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.functions import reward_model
from support.adapted import LORA, NF4, logits
from support.processes import cli
from support.tiny_models import causal_lm, put_into_cache, save_pair, word_tokenizer

WEIGHTS_AND_ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}


@pytest.fixture(autouse=True)
def tests_own_logging(monkeypatch):
    for name in ("log_to", "hush_libraries"):
        monkeypatch.setattr(export, name, lambda *arguments: None)


@pytest.fixture
def finished(tmp_path, policy_folder):
    """A folder like that of a finished stage sft which trained all weights, with what an export leaves behind."""
    folder = shutil.copytree(policy_folder, tmp_path / "runs" / "tiny" / "sft")
    manifest = {
        "recipe": "tiny",
        "stage": "sft",
        "status": "finished",
        "id": "abc123",
        "settings": {"sft": {"model": "./somewhere", "trainer": {}}, "trust_remote_code": []},
        "inputs": {},
        "seed": 43,
        "started": "2026-01-01T00:00:00+00:00",
        "versions": {"torch": "2.0", "rlhf-recipes": "0.1.0", "trl": None},
        "results": {"eval_loss": 1.5},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "recipe.yaml").write_text("name: tiny\n")
    for left in ("log.txt", "metrics.jsonl", "samples.jsonl", "training_args.bin", "reward_report.json"):
        (folder / left).write_text("{}")
    for left in ("checkpoint-2", "tensorboard", "wandb"):
        (folder / left).mkdir()
        (folder / left / "model.safetensors").write_text("no weights")
    return folder


def set_manifest(folder: Path, **values) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_whole_model_goes_with_tokenizer_template_and_card_but_without_the_runs_own_files(finished, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(finished)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(finished)
    out = export_run(finished, None, merge=False, dtype=None)
    assert out == finished.parent / "export-sft"
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    own = {"README.md", "recipe.yaml", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert names(out) == model_files | own
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.use_cache
    card = (out / "README.md").read_text()
    for said in ("# tiny: sft", "| seed | 43 |", "abc123", "torch 2.0, rlhf-recipes 0.1.0 |", '"eval_loss": 1.5'):
        assert said in card, said
    assert "./somewhere (a local folder, not of the Hub)" in card and "base_model" not in card
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in card


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_another_dtype(dtype, finished, tmp_path):
    out = export_run(finished, tmp_path / "deep" / "half", merge=False, dtype=dtype)
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (finished, out))
    assert after.dtype == getattr(torch, dtype) and after.config.use_cache
    for name, weight in before.named_parameters():
        assert torch.equal(weight.to(after.dtype), after.get_parameter(name)), name
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(finished).get_vocab()


def test_weights_are_cut_into_shards(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SHARD", "40KB")
    out = export_run(finished, tmp_path / "shards", merge=False, dtype="float32")
    assert len(list(out.glob("model-0*.safetensors"))) > 1 and not (out / "model.safetensors").exists()
    assert torch.equal(*(logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in (finished, out)))
    again = export_run_of(out, finished, tmp_path / "again")
    assert names(again) == names(out)


def export_run_of(model: Path, finished: Path, out: Path) -> Path:
    """Exports a run whose weights are those of another folder: shards and their index."""
    (finished / "model.safetensors").unlink()
    for path in (*model.glob("model-*.safetensors"), model / "model.safetensors.index.json"):
        shutil.copy(path, finished)
    return export_run(finished, out, merge=False, dtype=None)


def test_where_weights_do_not_fit_or_writing_fails_nothing_is_left(finished, tmp_path, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(finished)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = 1e5
    model.save_pretrained(finished)
    before = names(tmp_path)
    with pytest.raises(RecipeError, match="ln_f.weight has weights that are not finite in float16; take --dtype float"):
        export_run(finished, tmp_path / "out", merge=False, dtype="float16")
    assert names(tmp_path) == before

    def full(*arguments):
        (arguments[3] / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write", full)
    with pytest.raises(RecipeError, match="the export could not be written to .*out: No space left on device"):
        export_run(finished, tmp_path / "out", merge=False, dtype=None)
    monkeypatch.setattr(export, "_write", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_run(finished, tmp_path / "out", merge=False, dtype=None)
    assert names(tmp_path) == before


def test_what_cannot_be_exported_says_why(finished, tmp_path):
    def refused(folder=finished, out=None, merge=False, dtype=None):
        with pytest.raises(RecipeError) as caught:
            export_run(Path(folder), out, merge, dtype)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nowhere is no run (no such folder); name one such as" in refused("nowhere")
    assert f"{tmp_path} is no run (no manifest.json in it)" in refused(tmp_path)
    assert "it contains the runs: sft." in refused(finished.parent)
    assert "checkpoint-2 is no run" in refused(finished / "checkpoint-2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "full exists already; name a new folder" in refused(out=tmp_path / "full")
    assert "file exists already" in refused(out=tmp_path / "full" / "file")
    assert names(tmp_path / "full") == {"file"}
    assert "could not be written" in refused(out=tmp_path / "full" / "file" / "below")
    assert "base is inside the run; name a folder elsewhere" in refused(out=finished / "base")
    for status in ("running", "failed", "stopped"):
        set_manifest(finished, status=status)
        assert f"has not finished (its manifest.json says {status})" in refused()
    set_manifest(finished, status="finished", stage="eval")
    assert "stage eval trains no model" in refused()
    set_manifest(finished, stage="sft")
    (finished / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refused()
    (finished / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    assert "--dtype: " in refused(dtype="float16") and "add --merge" in refused(dtype="float16")
    (finished / "adapter_config.json").unlink()
    (tmp_path / "empty").mkdir()
    assert export_run(finished, tmp_path / "empty", False, None) == tmp_path / "empty"
    (finished / "model.safetensors").unlink()
    assert "are gone" in refused()


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "nf4"])
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "llama"])
def test_a_merged_adapter_has_the_logits_of_base_and_adapter(architecture, quantized, models, run, tmp_path):
    section = {"model": str(models[architecture]), "peft": LORA} | ({"quantization": NF4} if quantized else {})
    folder = run("sft", {"sft": section})
    base = AutoModelForCausalLM.from_pretrained(models[architecture])
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, folder))
    assert not torch.allclose(plain, expected, atol=1e-2)
    merged = export_run(folder, None, merge=True, dtype=None)
    assert merged == folder.parent.resolve() / "export-sft-merged" and not names(merged) & WEIGHTS_AND_ADAPTER
    (tmp_path / "runs").rename(tmp_path / "away")  # neither run nor base is needed any more
    merged = tmp_path / "away" / merged.relative_to(tmp_path / "runs")
    model, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.allclose(logits(model), expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert model.generation_config.eos_token_id in (tokenizer.eos_token_id, [tokenizer.eos_token_id])
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id and model.generation_config.use_cache
    card = (merged / "README.md").read_text()
    assert f"a whole model: the adapter merged into {models[architecture]}, in float32" in card
    assert ("trained on quantized weights (bnb_4bit_quant_type: " in card) == quantized
    assert "library_name: transformers" in card


@pytest.mark.slow
def test_a_merged_adapter_is_stored_as_its_base_is_or_as_asked(models, run, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.bfloat16)
    save_pair(tmp_path / "half", base, word_tokenizer())
    folder = run("sft", {"sft": {"model": str(tmp_path / "half"), "peft": LORA}})
    exact = AutoModelForCausalLM.from_pretrained(export_run(folder, tmp_path / "exact", True, "float32"))
    assert exact.dtype == torch.float32
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "half").float(), folder)
    assert torch.allclose(logits(exact), logits(adapted), atol=1e-5)
    stored = AutoModelForCausalLM.from_pretrained(export_run(folder, tmp_path / "stored", True, None))
    assert stored.dtype == torch.bfloat16
    for name, weight in exact.named_parameters():
        assert torch.equal(weight.bfloat16(), stored.get_parameter(name)), name


@pytest.mark.slow
def test_output_embeddings_that_were_trained_with_the_input_come_back_merged(models, run, trained):
    peft = {"target_modules": ["c_attn"], "modules_to_save": ["wte"]}
    folder = run("sft", {"sft": {"model": str(models["gpt2"]), "peft": peft}})
    merged = AutoModelForCausalLM.from_pretrained(export_run(folder, None, True, None))
    assert torch.allclose(logits(merged), logits(trained["sft"].model), atol=1e-5)


@pytest.mark.slow
def test_stages_start_from_exports_of_adapters_whose_run_was_moved(models, run, tmp_path):
    """All of a recipe's stages on adapters, moved and exported: as adapters and merged, a second recipe's inputs."""
    sections = {
        "sft": {"model": str(models["llama"]), "peft": LORA},
        "reward": {"peft": LORA},
        "ppo": {"peft": {}, "value_model": "policy"},
    }
    for stage in sections:
        run(stage, sections)
    shutil.move("runs", "moved")
    out = {}
    for stage in sections:
        for merge in (False, True):
            out[stage, merge] = export_run(Path("moved/tiny") / stage, None, merge, None)
    shutil.move("moved", "gone")
    out = {key: Path("gone/tiny") / folder.name for key, folder in out.items()}
    for merge in (False, True):
        read = {"completions": ["was great", "was very dull and awful ."], "completion_ids": [[5]] * 2}
        read |= {"prompts": ["the film"] * 2, "finished": [True, False]}
        scores = [reward_model(str(folder))(**read) for folder in (Path("gone/tiny/reward"), out["reward", merge])]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5) and scores[0][0] != scores[0][1]
        assert load_file(out["ppo", merge] / "value_model" / "model.safetensors").keys()
        folder = run(
            "ppo",
            {
                "ppo": {"policy": str(out["ppo", merge]), "value_model": str(out["ppo", merge] / "value_model")}
                | ({} if merge else {"peft": {}})
            },
            name=f"second-{merge}",
            reward_funcs=[{"name": "reward_model", "args": {"model": str(out["reward", merge])}}],
        )
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert first["kl"] == pytest.approx(0, abs=1e-5) and first["ratio"] == pytest.approx(1, abs=1e-5)
    starts = [load_model(AutoModelForCausalLM, "policy", str(out["ppo", merge])) for merge in (False, True)]
    assert torch.allclose(*map(logits, starts), atol=1e-5)
    for stage, merge in out:
        assert ("adapter_config.json" in names(out[stage, merge])) != merge
        assert not names(out[stage, merge]) & {"manifest.json", "log.txt", "metrics.jsonl", "tensorboard"}
    # The reward model's base, the merged adapter of stage sft, is nowhere else.
    base = AutoModelForSequenceClassification.from_pretrained(out["reward", False] / "base")
    plain = PeftModel.from_pretrained(base, out["reward", False])
    merged = AutoModelForSequenceClassification.from_pretrained(out["reward", True])
    padded = {"input_ids": torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0]]), "attention_mask": torch.ones(2, 4)}
    padded["input_ids"][1, 2:] = plain.config.pad_token_id = merged.config.pad_token_id
    assert merged.config.pad_token_id == word_tokenizer().pad_token_id
    with torch.no_grad():
        assert torch.allclose(plain.eval()(**padded).logits, merged.eval()(**padded).logits, atol=1e-5)
    card = (out["ppo", False] / "README.md").read_text()
    assert (
        f"it needs its base, the local folder {models['llama'].resolve()}: on another machine, copy that folder too"
        in card
    )
    assert "| started from | stage sft (run " in card and "with its value network in value_model/" in card
    assert 'PeftModel.from_pretrained(base, "FOLDER")' in (out["reward", False] / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("peft", [{}, {"peft": {"target_modules": ["c_attn"]}}], ids=["full", "lora"])
def test_a_models_own_code_goes_along(peft, own_code, run, tmp_path):
    folder = run("rloo", {"rloo": {"policy": str(own_code[0]), **peft}}, trust_remote_code=[str(own_code[0])])
    out = export_run(folder, tmp_path / "out", merge=bool(peft), dtype=None)
    assert (out / "modeling_own.py").is_file()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_what_a_card_says_loads_an_adapter_of_dora(stage, models, run):
    folder = run(stage, {stage: {"model": str(models["llama"]), "peft": LORA | {"use_dora": True}}})
    out = export_run(folder, None, merge=False, dtype=None)
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft" and card.data.tags == ["rlhf_recipes", "trl", stage]
    said = {}
    exec(card.content.split("```python")[1].split("```")[0].replace("FOLDER", str(out)), said)
    auto_class = {"sft": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}[stage]
    expected = logits(load_model(auto_class, "here", str(folder)))
    assert torch.allclose(logits(said["model"]), expected, atol=1e-5)
    assert said["tokenizer"].get_vocab() == word_tokenizer().get_vocab()


@pytest.mark.slow
def test_a_value_network_is_converted_with_its_policy(models, run, tmp_path):
    folder = run("ppo", {"ppo": {"policy": str(models["gpt_neox"]), "value_model": "policy"}})
    out = export_run(folder, None, False, "bfloat16")
    network = AutoModelForSequenceClassification.from_pretrained(out / "value_model")
    before = AutoModelForSequenceClassification.from_pretrained(folder / "value_model")
    assert network.dtype == torch.bfloat16 and before.dtype == torch.float32
    for name, weight in before.named_parameters():
        assert torch.equal(weight.bfloat16(), network.get_parameter(name)), name
    assert (out / "value_model" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_base_of_the_hub_is_named_with_its_commit(hub_cache, tmp_path, reviews_file):
    tokenizer = word_tokenizer()
    commit = put_into_cache(hub_cache, "org/lm", save_pair(tmp_path / "lm", causal_lm(tokenizer), tokenizer), "main")
    (tmp_path / "r.yaml").write_text(
        "name: r\ndescription: d\ndata: {path: reviews.jsonl, prompt_tokens: [2, 4], eval_fraction: 0.3}\n"
        "reward_funcs: [{name: length}]\n"
        "rloo: {policy: org/lm, peft: {r: 4}, trainer: {max_steps: 1, max_completion_length: 4}}\n"
    )
    done = cli("rloo", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    card = (export_run(tmp_path / "runs/r/rloo", None, False, None) / "README.md").read_text()
    assert f'AutoModelForCausalLM.from_pretrained("org/lm", revision="{commit}")' in card
    assert "it needs its base, org/lm of the Hub (--merge makes" in card
    assert "base_model: org/lm\nlibrary_name: peft\n" in card and f"| base | org/lm at commit {commit} |" in card
    assert f"| started from | org/lm of the Hub at commit {commit} |" in card
    done = cli("export", "runs/r/rloo", "--merge", "--dtype", "bfloat16", cwd=tmp_path)
    assert done.returncode == 0 and "merged into org/lm of the Hub, in bfloat16" in done.stdout, done.stderr
    assert done.stdout.endswith(f"exported to {tmp_path.resolve()}/runs/r/export-rloo-merged\n")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs/r/export-rloo-merged").dtype == torch.bfloat16
    again = cli("export", "runs/r/rloo", "--merge", cwd=tmp_path)
    assert again.returncode == 2 and again.stderr.startswith("error: --out: ") and again.stderr.count("\n") == 1

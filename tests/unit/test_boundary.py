"""A library's error ends a stage with one sentence that says where to look, and exit code 2."""

import json
import re
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from rlhf_recipes import sft, stage
from rlhf_recipes.system.errors import explain
from support.texts import REVIEWS, write_jsonl

NO_KINDNESS = (
    "{% for message in messages %}{% if 'kind' in message['content'] %}{{ raise_exception('no kindness here') }}"
    "{% endif %}{{ message['content'] }}{% endfor %}"
)


@pytest.fixture
def sft_stage(tmp_path, monkeypatch, capsys, policy_folder):
    """Runs stage sft of a recipe in this process; returns what it said, its manifest's error and its log."""

    def run(rows: list[dict], trainer: str, model=policy_folder) -> tuple[str, str, str]:
        write_jsonl(tmp_path / "rows.jsonl", rows)
        (tmp_path / "r.yaml").write_text(
            f"name: r\ndescription: d\nruns_dir: {tmp_path}/runs\ndata: {{path: {tmp_path}/rows.jsonl}}\n"
            f"reward_funcs: [{{name: length}}]\nsft: {{model: {model}, trainer: {{max_steps: 1, {trainer}}}}}\n"
        )
        monkeypatch.setattr(stage.signal, "signal", lambda *arguments: None)
        assert stage.run_stage("sft", sft.main, str(tmp_path / "r.yaml"), [], False) == stage.USER_ERROR
        folder = tmp_path / "runs/r/sft"
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["status"] == "failed"
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1 and said[0].endswith(f"(traceback in {folder / 'log.txt'})")
        return said[0], manifest["error"], (folder / "log.txt").read_text()

    return run


@pytest.mark.parametrize(
    ("trainer", "place"),
    [
        ("optim: adamw_torch, optim_args: betas", "sft.trainer.optim_args: ValueError: "),
        ("padding_free: true", "sft.trainer.padding_free: ValueError: "),  # before: the model cannot be used
        ("chat_template_path: /nowhere", "sft.trainer.chat_template_path: OSError: "),
    ],
)
def test_an_argument_that_a_library_refuses_is_named(sft_stage, trainer, place):
    said, recorded, log = sft_stage(REVIEWS, trainer)
    assert place in said and place in recorded
    assert "Traceback (most recent call last)" in log and place.split()[1].rstrip(":") in log


def test_an_optimizer_whose_package_is_not_installed_is_named(monkeypatch, tmp_path, policy_folder):
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    refused = []
    for optim in OptimizerNames:
        args = TrainingArguments(tmp_path, optim=optim, optim_target_modules="all-linear", use_cpu=True)
        try:
            Trainer.get_optimizer_cls_and_kwargs(args, model)
        except (ImportError, ValueError) as error:
            said = explain(error, "rloo", {"learning_rate": 1e-5, "optim": optim.value})
            assert said.startswith("rloo.trainer.optim: "), said
            refused.append(optim.value)
    assert {"paged_adamw_8bit", "lion_8bit", "galore_adamw", "schedule_free_adamw"} <= set(refused)


def test_a_chat_template_that_refuses_a_row_names_it(sft_stage, tmp_path, policy_folder):
    model = shutil.copytree(policy_folder, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = NO_KINDNESS
    tokenizer.save_pretrained(model)
    rows = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a film"}]}
        for content in ["be kind"] * 2 + ["hi"] * 18
    ]
    said, recorded, _ = sft_stage(rows, "logging_steps: 1", model)
    assert re.search("sft: row [0-9]+ of the data, .*be kind.*TemplateError: no kindness here", said)
    assert "no kindness here" in recorded


def test_an_error_that_no_key_explains_names_the_stage():
    assert explain(KeyError("x"), "rloo", {"beta": 0.1}) == "rloo: KeyError: 'x'"
    assert explain(MemoryError(), "rloo", {}) == "rloo: MemoryError"
    assert explain(ValueError("alphabeta is wrong"), "rloo", {"beta": 0.1}) == "rloo: ValueError: alphabeta is wrong"
    assert explain(ValueError("beta is wrong"), "ppo", {"lam": 1, "beta": 0.1}).startswith("ppo.trainer.beta: ")

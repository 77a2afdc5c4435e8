"""A real language model, SmolLM2-135M with its own tokenizer: trained, killed, resumed, exported, and read by transformers."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_recipes.models.load import load_model
from rlhf_recipes.models.sampling import sample_completions
from rlhf_recipes.runs.fetched import is_fetched
from rlhf_recipes.system.files import MARKER
from support.processes import cli, run_python
from support.texts import REVIEWS, write_jsonl

pytestmark = pytest.mark.skipif(
    not is_fetched("smollm2"), reason="the real model is not here: rlhf-recipes fetch smollm2"
)

RECIPE = {
    "name": "real",
    "description": "two updates of a real model",
    "data": {"path": "reviews.jsonl", "prompt_tokens": [3, 8]},
    "special_tokens": {"pad_token": "<|endoftext|>"},
    "reward_funcs": [{"name": "length"}],
    "rloo": {
        "policy": "fetched:smollm2",
        "peft": {"r": 4, "target_modules": "all-linear"},
        "trainer": {
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 8,
            "max_steps": 2,
            "save_strategy": "steps",
            "save_steps": 1,
        },
    },
}


@pytest.mark.slow
def test_a_real_model_resumes_exactly_and_its_export_is_the_model(tmp_path):
    write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    (tmp_path / "real.yaml").write_text(json.dumps(RECIPE))
    train = ("-m", "rlhf_recipes.rloo", "--recipe", "real.yaml")
    done = run_python(*train, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    process = subprocess.Popen([sys.executable, *train, "runs_dir=killed"], cwd=tmp_path)
    whole, killed = (tmp_path / folder / "real" / "rloo" for folder in ("runs", "killed"))
    while process.poll() is None and not (killed / "checkpoint-1" / MARKER).exists():
        pass
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (killed / "adapter_model.safetensors").exists()
    done = run_python(*train, "runs_dir=killed", cwd=tmp_path)
    assert "resumes from step 1 of 2" in done.stdout, done.stdout + done.stderr
    first, second = (load_file(run / "adapter_model.safetensors") for run in (whole, killed))
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)

    done = cli("export", str(whole), "--merge", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = load_model(AutoModelForCausalLM, "rloo", str(whole)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    ids = tokenizer("This movie was")["input_ids"]
    assert torch.equal(exported(torch.tensor([ids])).logits, ours(torch.tensor([ids])).logits)
    greedy = exported.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert sample_completions(ours, [ids, ids[:2]], 0, 12, 1e-6, [2])[0] == greedy

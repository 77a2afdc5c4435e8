"""Models with adapters or 4-bit weights, and stages that run on them in the process of the tests."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from rlhf_recipes.recipe.checks import check_recipe
from rlhf_recipes.runs import callbacks
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.trainers import train
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}


# bitsandbytes' kernels for a CPU take layers of a multiple of 64 inputs.
WIDTHS = {
    "gpt2": {"n_embd": 64},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
}


BERTS = {
    "distilbert": {"dim": 64, "n_layers": 2, "n_heads": 2, "hidden_dim": 128},
    "deberta-v2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
}


IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> folder of a random model, for every architecture; BERTs have no head."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), word_tokenizer()
    made = {n: save_pair(folder / n, causal_lm(tokenizer, n, **width), tokenizer) for n, width in WIDTHS.items()}
    for name, sizes in BERTS.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes)
        made[name] = save_pair(folder / name, AutoModel.from_config(config), tokenizer)
    return made


@pytest.fixture
def trained(monkeypatch):
    """Stage -> its trainer at the time when it saved its model."""
    seen, save = {}, callbacks.save_model

    def save_and_keep(trainer, run):
        seen[run.stage] = trainer
        save(trainer, run)

    for module in (callbacks, train):
        monkeypatch.setattr(module, "save_model", save_and_keep)
    return seen


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a stage of a small recipe in this process; returns its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)
    texts = {"per_device_train_batch_size": 4, "max_steps": 2, "max_length": 32, "learning_rate": 1e-2}
    rollouts = {
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "num_generations": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "beta": 0.1,
    }
    trainers = {"sft": texts, "reward": texts, "ppo": rollouts, "rloo": rollouts}

    def run(stage: str, sections: dict, checkpoint: Path | None = None, **recipe) -> Path:
        values = {
            "name": "tiny",
            "description": "tiny",
            "data": {"path": "reviews.jsonl", "prompt_tokens": [2, 4], "eval_fraction": 0.3},
            "reward_funcs": [{"name": "length"}],
            "eval": {"num_prompts": 4},
            **{
                name: section | {"trainer": trainers[name] | section.get("trainer", {})}
                if name in trainers
                else section
                for name, section in sections.items()
            },
            **recipe,
        }
        started = Run(check_recipe(values, "tiny"), stage)
        started.start()
        started.checkpoint = checkpoint
        import_module(f"rlhf_recipes.{'evaluate' if stage == 'eval' else stage}").main(started)
        started.finish()
        return started.path

    return run


def logits(model):
    model.eval()
    for part in model.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):  # by which bitsandbytes rounds a model that is evaluated
            part.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
Path({mark!r}).touch()
from transformers import GPT2Config, GPT2LMHeadModel


class OwnConfig(GPT2Config):
    model_type = "own"


class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path, policy_folder, monkeypatch):
    """A model with its own Python code, and the file that this code writes when it runs."""
    folder, mark = tmp_path / "own", tmp_path / "executed"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    shutil.copytree(policy_folder, folder)
    (folder / "modeling_own.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, mark

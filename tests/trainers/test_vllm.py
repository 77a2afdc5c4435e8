"""Sampling with vLLM: a stand-in takes weights as vLLM does, and samples from what it was sent and nothing else."""

import json
import math
import os
import sys
from types import SimpleNamespace

import accelerate
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from trl.generation import vllm_generation

from rlhf_recipes import PPOTrainer, RLOOTrainer
from rlhf_recipes.models.forward import completion_logits, sampled_logps
from rlhf_recipes.models.sampling import sample_completions
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.trainers.args import trainer_args
from rlhf_recipes.trainers.ppo import PPOConfig
from support.places import ROOT
from support.processes import run_python
from support.tiny_models import word_tokenizer
from support.tiny_trainers import ALGORITHMS, make

pytestmark = pytest.mark.slow

TOKENIZER = word_tokenizer()

LORA = {"r": 4, "lora_alpha": 64, "target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}

CASES = {
    "rloo": (RLOOTrainer, {}),
    "rloo-lora": (RLOOTrainer, {"peft_config": LoraConfig(**LORA)}),
    "ppo-shared": (PPOTrainer, {"value_model": "shared"}),
    "ppo-separate": (PPOTrainer, {"value_model": "policy", "num_generations": 1}),
    "ppo-shared-lora": (PPOTrainer, {"value_model": "shared", "peft_config": LoraConfig(**LORA)}),
    "ppo-separate-lora": (PPOTrainer, {"value_model": "policy", "peft_config": LoraConfig(**LORA)}),
}


class Engine:
    """Holds a plain causal language model, as a vLLM does that was started with the policy's name."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.syncs = []
        """Names of every sync, in the order sent."""

    def load(self, weights):
        parameters = dict(self.model.named_parameters())
        for name, tensor in weights:
            parameters[name].data.copy_(tensor)  # KeyError: vLLM knows no such weight either

    def sample(self, prompts, max_tokens, temperature):
        return sample_completions(
            self.model, prompts, TOKENIZER.pad_token_id, max_tokens, temperature, [TOKENIZER.eos_token_id]
        )


class Client:
    """Stands in for TRL's VLLMClient and the server behind it."""

    def __init__(self, engine):
        self.engine, self.asked = engine, []

    def init_communicator(self, device):
        pass

    def reset_prefix_cache(self):
        pass

    def update_named_params(self, metadata, named_params):
        """As vLLM packs: views of all tensors first, then one copy of them all (up to 1 GiB) goes on the wire."""
        views = [(name, tensor.contiguous().view(-1)) for name, tensor in named_params]
        packed = torch.cat([view for _, view in views])
        names = [name for name, _, _ in metadata]
        assert [name for name, _ in views] == names
        self.engine.syncs.append(names)
        parts = packed.split([math.prod(shape) for _, _, shape in metadata])
        self.engine.load((n, part.view(shape)) for (n, _, shape), part in zip(metadata, parts, strict=True))

    def generate(self, prompts, n, max_tokens, temperature, **others):
        self.asked.append((len(prompts), n, others["logprobs"]))
        repeated = [prompt for prompt in prompts for _ in range(n)]
        completions = self.engine.sample(repeated, max_tokens, temperature)
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}


@pytest.fixture
def server(policy_folder, monkeypatch):
    """The client of a server that runs the policy."""
    client = Client(Engine(policy_folder))
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "VLLMClient", lambda **given: client)
    return client


@pytest.fixture
def colocated(policy_folder, monkeypatch):
    """The engine in the trainer's own process."""
    engine = Engine(policy_folder)

    class LLM:
        def __init__(self, model, **given):
            assert model == str(policy_folder)
            runner = SimpleNamespace(model=SimpleNamespace(load_weights=self.load))
            executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
            self.llm_engine = SimpleNamespace(model_executor=executor)
            self.sync = []

        def load(self, weights):
            self.sync += [name for name, _ in weights]
            engine.load(weights)

        def reset_prefix_cache(self):
            engine.syncs.append(self.sync)
            self.sync = []

        def generate(self, prompts, sampling_params, use_tqdm):
            ids = [prompt["prompt_token_ids"] for prompt in prompts]
            completions = engine.sample(ids, sampling_params.max_tokens, sampling_params.temperature)
            return [
                SimpleNamespace(prompt_token_ids=i, outputs=[SimpleNamespace(token_ids=c, logprobs=None)])
                for i, c in zip(ids, completions, strict=True)
            ]

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    return engine


def trained(trainer_class, model, folder, engine, mode, **settings):
    """Trains three steps, a rollout each; every rollout must be what the engine's model says of it (None: it is another's)."""
    settings |= {"use_vllm": True, "vllm_mode": mode, "beta": 0.1, "max_steps": 3, "learning_rate": 0.02}
    trainer = make(trainer_class, model, folder, **settings)
    rollout, distances = trainer._generate_and_score_completions, []

    def compared(inputs):
        output = rollout(inputs)
        if engine is None:
            return output
        ids, mask = (torch.cat([output[f"prompt_{x}"], output[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        length = output["completion_ids"].size(1)
        with torch.no_grad():
            logits, _ = completion_logits(engine.model, ids, mask, length)
            logps, _ = sampled_logps(logits, ids[:, -length:], trainer.temperature)
        distances.append(((logps - output["old_per_token_logps"]) * output["completion_mask"]).abs().max().item())
        return output

    trainer._generate_and_score_completions = compared
    trainer.train()
    assert len(distances) == (0 if engine is None else 3)
    assert max(distances, default=0.0) < 1e-4, distances
    return trainer


def names_of(folder):
    return [name for name, _ in AutoModelForCausalLM.from_pretrained(folder).named_parameters()]


@pytest.mark.parametrize("case", CASES)
def test_a_server_is_sent_the_policys_weights_and_no_others(case, server, policy_folder, tmp_path):
    trainer_class, settings = CASES[case]
    trainer = trained(trainer_class, policy_folder, tmp_path, server.engine, "server", **settings)
    assert server.engine.syncs == [names_of(policy_folder)] * 3
    generations = trainer.num_generations
    assert server.asked == [(8 // generations, generations, None)] * 3
    if trainer_class is PPOTrainer:
        assert any(name.startswith("value_network.") for name, _ in trainer.model.named_parameters())
    # What was sent did change, or the comparison with the engine's model would show nothing.
    start = AutoModelForCausalLM.from_pretrained(policy_folder).state_dict()
    moved = {n: (t - start[n]).abs().max().item() for n, t in server.engine.model.named_parameters()}
    assert max(moved.values()) > 1e-3


RANK = """
import json, os, sys
from pathlib import Path
from test_vllm import CASES, Client, Engine, trained, vllm_generation

folder, case, out = sys.argv[1:]
client = Client(Engine(folder))
vllm_generation.is_vllm_available = lambda: True
vllm_generation.VLLMClient = lambda **given: client
trainer_class, settings = CASES[case]
# Only what the main process was told of can be sampled from; the others' engines stay as they were.
main = os.environ["RANK"] == "0"
trainer = trained(trainer_class, folder, out, client.engine if main else None, "server", **settings)
Path(out, os.environ["RANK"]).write_text(json.dumps([trainer.accelerator.num_processes, client.engine.syncs, client.asked]))
"""


@pytest.mark.parametrize("case", [pytest.param("rloo-lora", marks=pytest.mark.nightly), "ppo-separate"])
def test_of_two_processes_one_talks_to_the_server(case, policy_folder, tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    config = ROOT / "accelerate_configs" / "cpu_ddp_2.yaml"
    launch = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    arguments = (str(tmp_path / "rank.py"), str(policy_folder), case, str(tmp_path))
    done = run_python(*launch, *arguments, cwd=tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr
    (processes, syncs, asked), (_, *silent) = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    generations = CASES[case][1].get("num_generations", 2)
    assert processes == 2 and syncs == [names_of(policy_folder)] * 3
    assert asked == [[16 // generations, generations, None]] * 3  # of both
    assert silent == [[], []]


@pytest.mark.parametrize("case", ["ppo-shared", "ppo-separate-lora", "rloo-lora"])
def test_an_engine_in_the_process_is_sent_the_same(case, colocated, policy_folder, tmp_path):
    trainer_class, settings = CASES[case]
    trained(trainer_class, policy_folder, tmp_path, colocated, "colocate", **settings)
    assert colocated.syncs == [names_of(policy_folder)] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merging_for_a_sync_leaves_the_base_as_it_is(dtype, server, policy_folder, tmp_path):
    trainer = make(
        PPOTrainer, policy_folder, tmp_path, use_vllm=True, vllm_mode="server", max_steps=3, learning_rate=0.02,
        peft_config=LoraConfig(**LORA), model_init_kwargs={"dtype": dtype},
    )  # fmt: skip
    trainer.train()
    assert len(server.engine.syncs) == 3
    start = AutoModelForCausalLM.from_pretrained(policy_folder, dtype=dtype).state_dict()
    base = {n: p for n, p in trainer.model.get_base_model().named_parameters() if "lora_" not in n}
    assert len(base) == len(names_of(policy_folder))
    for name, tensor in base.items():
        torch.testing.assert_close(tensor.data, start[name.replace(".base_layer", "")], rtol=0, atol=0)


def test_an_adapter_that_training_goes_on_with_is_sent_once(server, policy_folder, tmp_path):
    """TRL copies it for the reference, and with it the layers that it has whole."""
    base = AutoModelForCausalLM.from_pretrained(policy_folder)
    get_peft_model(base, LoraConfig(**LORA, modules_to_save=["ln_f"])).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(policy_folder)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainer = trained(PPOTrainer, model, tmp_path, server.engine, "server")
    assert any(".modules_to_save.ref." in name for name, _ in trainer.model.named_parameters())
    assert [sorted(names) for names in server.engine.syncs] == [sorted(names_of(policy_folder))] * 3


@pytest.mark.parametrize("trainer_class", ALGORITHMS)
def test_what_is_not_corrected_is_said_once(trainer_class, server, policy_folder, tmp_path, caplog, monkeypatch):
    def said():
        return [record for record in caplog.records if "nothing corrects" in record.getMessage()]

    trainer = make(trainer_class, policy_folder, tmp_path, use_vllm=True, vllm_mode="server", max_steps=2)
    trainer.train()
    assert [record.levelname for record in said()] == ["WARNING"]
    caplog.clear()
    monkeypatch.setattr(accelerate.Accelerator, "is_main_process", False)
    make(trainer_class, policy_folder, tmp_path, use_vllm=True, vllm_mode="server")
    assert not said()


def test_vllm_with_a_quantized_base_is_refused(tmp_path):
    overrides = ["ppo.trainer.use_vllm=true", "ppo.peft={r: 4}", "ppo.quantization={load_in_4bit: true}"]
    recipe = load_recipe("imdb_tiny", [f"runs_dir={tmp_path}", *overrides])
    with pytest.raises(RecipeError, match=r"^ppo.trainer.use_vllm: .*remove ppo.quantization"):
        trainer_args(Run(recipe, "ppo"), PPOConfig)

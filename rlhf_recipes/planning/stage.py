"""One stage of a recipe on a machine, before it runs: memory at its worst moments, steps, rows and tokens.

Nothing is downloaded but a `config.json` that is not here already, no weights are made, and no GPU is needed.
"""

import math
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from rlhf_recipes.launch.configs import find_config, kind, offloads, read_config, zero_stage
from rlhf_recipes.models.adapters import lora_of, quantization_of
from rlhf_recipes.models.load import adapter_of, load_config
from rlhf_recipes.planning.memory import GIB, Batch, Estimate, Launch, model_of, moments
from rlhf_recipes.recipe.load import rollout_size
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.runs.inputs import OWN_VALUE_MODELS
from rlhf_recipes.runs.references import is_hub_model, is_offline, loading, locate_in_package
from rlhf_recipes.trainers.config import OnPolicyConfig

PLANNED = ("sft", "reward", "ppo", "rloo")

PPO_DEFAULTS = {"num_generations": 1}
"""What `PPOConfig` has of the settings that count here and `OnPolicyConfig` has otherwise; to import it takes seconds."""

COUNTS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size",
    "sampling_batch_size", "num_generations", "num_iterations", "max_completion_length", "max_length",
)  # fmt: skip
"""Settings that are multiplied and divided by here; the trainers refuse what is not above 0, too, but are not asked."""

GIGABYTES = {
    "T4": 16, "V100": 16, "P100": 16, "L4": 24, "A10": 24, "A10G": 24, "A30": 24, "A40": 48, "L40": 48, "L40S": 48,
    "A100": 80, "H100": 80, "H200": 141, "H20": 96, "B200": 180, "GH200": 96, "MI300X": 192, "A6000": 48, "RTX6000": 24,
    "RTX2080TI": 11, "RTX3060": 12, "RTX3070": 8, "RTX3080": 10, "RTX3090": 24, "RTX4060": 8, "RTX4070": 12,
    "RTX4080": 16, "RTX4090": 24, "RTX5080": 16, "RTX5090": 32,
}  # fmt: skip
"""Memory of GPUs that are known by name; of those that come in two sizes the commoner one."""

RESERVED_BYTES, RESERVED_SHARE = 1 * GIB, 0.04
"""Of a GPU, what is left alone: CUDA's context and libraries, and memory that its allocator cannot use."""

IMPORTS = 0.7 * GIB
"""Of a CPU's memory, what a process takes before there is a model."""

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_NEOX = {"model_type": "gpt_neox", "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False}


def _neox(layers: int, hidden: int, heads: int, vocabulary: int = 50304) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return _NEOX | sizes | {"intermediate_size": 4 * hidden, "vocab_size": vocabulary}


ARCHITECTURES = {
    "openai-community/gpt2": _GPT2,
    "lvwerra/gpt2-imdb": _GPT2,
    "distilbert/distilgpt2": _GPT2 | {"n_layer": 6},
    "openai-community/gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "openai-community/gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "openai-community/gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "EleutherAI/pythia-160m-deduped": _neox(12, 768, 12),
    "EleutherAI/pythia-410m-deduped": _neox(24, 1024, 16),
    "EleutherAI/pythia-1b-deduped": _neox(16, 2048, 8),
    "EleutherAI/pythia-1.4b-deduped": _neox(24, 2048, 16),
    "EleutherAI/pythia-2.8b-deduped": _neox(32, 2560, 32),
    "EleutherAI/pythia-6.9b-deduped": _neox(32, 4096, 32, 50432),
    "distilbert/distilbert-base-uncased": {"model_type": "distilbert"},
    "distilbert/distilbert-base-cased": {"model_type": "distilbert", "vocab_size": 28996},
    "lvwerra/distilbert-imdb": {"model_type": "distilbert"},
    "microsoft/deberta-v3-base": {
        "model_type": "deberta-v2",
        "vocab_size": 128100,
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 256,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "layer_norm_eps": 1e-7,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}
"""Configurations of Hub models that the recipes name, so that these can be planned without network."""


# The machine


@dataclass(frozen=True)
class Machine:
    """`count` GPUs, or processes on a CPU, and the bytes that each of them has."""

    count: int
    name: str
    bytes: float

    @property
    def device(self) -> str:
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def reserve(self) -> float:
        return IMPORTS if self.device == "cpu" else RESERVED_BYTES + RESERVED_SHARE * self.bytes

    def __str__(self) -> str:
        return f"{self.count} x {self.name}, {self.bytes / GIB:.0f} GB each"


def machine_of(text: str | None, processes: int = 1) -> Machine:
    """What `--gpu` says; None: what is here.

    Args:
        text: `--gpu`.
        processes: How many, where the text does not say it.

    Raises:
        RecipeError: It cannot be read, or names a GPU whose memory is not known.
    """
    if text is None and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Machine(torch.cuda.device_count(), properties.name, properties.total_memory)
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(
        rf"(?:(\d+)x)?(?:([A-Za-z][\w ]*)(?:-{number})?|{number})", "cpu" if text is None else text, re.IGNORECASE
    )
    if match is not None and int(match[1] or 1) > 0:
        count, name, size = int(match[1] or processes), match[2] or "GPU", match[3] or match[4]
        known = {name.upper(): gigabytes for name, gigabytes in GIGABYTES.items()}
        if name.lower() == "cpu":
            return Machine(count, "cpu", float(size) * GIB if size else psutil.virtual_memory().total / count)
        size = size or known.get(name.replace(" ", "").upper())
        if size is not None and float(size) > 0:
            return Machine(count, name, float(size) * GIB)
    raise RecipeError(
        f"--gpu: {text!r} names no GPU of known memory; write NxNAME-GB, such as 8xH100-80, 1xRTX3060-12, 2x24 or cpu-16; "
        f"by name alone: {', '.join(GIGABYTES)}, cpu."
    )


def launch_of(machine: Machine, accelerate_config: str | None) -> Launch:
    """How a stage is started on all of a machine: one process each, DDP unless a configuration of accelerate says otherwise.

    Args:
        machine: Where it runs.
        accelerate_config: Name or file of the configuration.

    Raises:
        RecipeError: There is none, or there are no numbers for its kind of distribution.
    """
    values = {"distributed_type": "NO"} if accelerate_config is None else read_config(find_config(accelerate_config))
    precision = values.get("mixed_precision")
    half = machine.device != "cpu" if precision is None else precision in ("bf16", "fp16")
    launch = Launch(processes=machine.count, half=half, device=machine.device)
    if values["distributed_type"] in ("NO", "MULTI_GPU"):
        return launch
    stage = zero_stage(values) if values["distributed_type"] == "DEEPSPEED" else None
    if stage not in (1, 2):
        raise RecipeError(
            f"--accelerate-config: {accelerate_config} is {kind(values)}, which plan has no numbers for; take one with DDP, ZeRO-1 or ZeRO-2."
        )
    return replace(launch, zero_stage=stage, offload=offloads(values))


# Models, by their configurations


def config_of(recipe: Recipe, key: str, reference: str, passed: tuple[str, ...] = ()) -> tuple[Any, Any]:
    """Configuration of what a reference stands for, and of the adapter that it is (None: a whole model).

    A stage need not have run: what it starts from has the same sizes.

    Args:
        recipe: The recipe, for `stage:` references.
        key: Where the reference stands in the recipe, for messages.
        reference: `stage:NAME`, a folder, `package:NAME/FOLDER`, or a Hub id.
        passed: Stages that led here.

    Raises:
        RecipeError: It is not here, and not to be had from the Hub; or stages start from one another.
    """
    from transformers import AutoConfig

    if reference.startswith("stage:"):
        return _config_of_stage(recipe, key, reference.removeprefix("stage:"), passed)
    if reference.startswith("package:"):
        return _config_of_folder(recipe, key, str(locate_in_package(key, reference)), reference)
    if not is_hub_model(reference):
        folder = Path(reference).expanduser()
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise RecipeError(
                f"{key}: {reference} has no config.json (looked from {Path.cwd()}); set it to a model's folder."
            )
        return _config_of_folder(recipe, key, str(folder), reference)
    name, _, revision = reference.partition("@")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json", revision=revision or None)
    if not isinstance(cached, str) and name in ARCHITECTURES:
        return AutoConfig.for_model(**ARCHITECTURES[name]), None
    try:
        with loading(key, reference):
            if not isinstance(cached, str) and not is_offline():
                _reach_hub()
            how = {"revision": revision or "main", "local_files_only": is_offline()}
            return AutoConfig.from_pretrained(
                name, trust_remote_code=reference in recipe.trust_remote_code, **how
            ), None
    except RecipeError as error:
        raise RecipeError(
            f"{key}: the config.json of {reference} is needed, and is neither here nor to be had from the Hub; set {key} to "
            "a local folder that has it."
        ) from error


def _reach_hub() -> None:
    """Find out in seconds that there is no network; huggingface_hub tries again for most of a minute.

    Raises:
        OSError: The Hub does not answer.
    """
    from huggingface_hub.constants import ENDPOINT

    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=5).close()
    except URLError as error:  # what answers, with an error or another certificate, is huggingface_hub's matter
        if not isinstance(error, HTTPError) and not isinstance(error.reason, ssl.SSLError):
            raise


def _config_of_folder(recipe: Recipe, key: str, folder: str, reference: str) -> tuple[Any, Any]:
    return load_config(key, folder, reference in recipe.trust_remote_code), adapter_of(key, folder)


def _config_of_stage(recipe: Recipe, key: str, stage: str, passed: tuple[str, ...]) -> tuple[Any, Any]:
    from transformers import AutoConfig

    if stage in passed:
        raise RecipeError(f"{key}: stage:{stage}: it starts from what is made of it; set {key} to a model.")
    section = getattr(recipe, stage, None) if stage in PLANNED else None
    if section is None:
        raise RecipeError(f"{key}: stage:{stage}: recipe {recipe.name} has no stage {stage} that makes a model.")
    if stage == "sft" and section.scratch is not None:
        scratch = section.scratch
        with loading("sft.scratch", scratch.architecture):
            return AutoConfig.for_model(scratch.architecture, vocab_size=scratch.vocabulary, **scratch.config), None
    name = "policy" if stage in ("ppo", "rloo") else "model"
    config, adapter = config_of(recipe, f"{stage}.{name}", getattr(section, name), (*passed, stage))
    if section.peft is not None:  # what comes out is an adapter
        return config, adapter or lora_of(stage, section.peft)
    return config, None


def _drops_out(config: Any) -> bool:
    return any("drop" in name and value for name, value in config.to_dict().items() if isinstance(value, float))


# Stages


@dataclass(frozen=True)
class Work:
    """What a stage goes through; None where only the data knows."""

    rows: int | None
    """Texts (sft), pairs (reward) or episodes (ppo, rloo), over all epochs."""
    steps: int | None
    tokens: int | None
    """At most."""
    at_most: bool
    """Whether rows and steps may be fewer, because the data may have less."""


@dataclass(frozen=True)
class StagePlan:
    """A stage on a machine."""

    stage: str
    machine: Machine
    launch: Launch
    batch: Batch
    moments: dict[str, Estimate]
    otherwise: float
    """Total with gradient checkpointing, if it is off, or without, if it is on."""
    work: Work
    notes: list[str]

    @property
    def total(self) -> float:
        return max(moment.total for moment in self.moments.values())

    @property
    def headroom(self) -> float:
        return self.machine.bytes - self.machine.reserve - self.total

    @property
    def fits_without(self) -> bool:
        """True if gradient checkpointing is on, and the stage fits without it."""
        return self.batch.checkpointing and self.otherwise <= self.machine.bytes - self.machine.reserve

    @property
    def fits(self) -> bool:
        return self.headroom >= 0


def settings_of(recipe: Recipe, stage: str, processes: int) -> dict[str, Any]:
    """A stage's trainer settings: the recipe's, and defaults of the trainer's own configuration class.

    Raises:
        RecipeError: The processes cannot share the global batch, or a number is not above 0.
    """
    from trl import RewardConfig, SFTConfig

    config_class = {"sft": SFTConfig, "reward": RewardConfig}.get(stage, OnPolicyConfig)
    own = PPO_DEFAULTS if stage == "ppo" else {}
    defaults = {field.name: field.default for field in fields(config_class) if field.default is not MISSING}
    section = getattr(recipe, stage)
    findings = []
    for name in set(COUNTS) & set(section.trainer):
        value = section.trainer[name]
        optional = name == "max_length" or defaults[name] is None
        if (value is None and not optional) or (value is not None and value < 1):
            findings.append(f"{stage}.trainer.{name}: must be above 0, not {'null' if value is None else value}.")
    if findings:
        raise RecipeError("\n".join(sorted(findings)))
    return defaults | own | section.trainer | recipe.batches(stage, processes)


def plan_stage(recipe: Recipe, stage: str, machine: Machine, launch: Launch) -> StagePlan:
    """Memory and work of one stage.

    Raises:
        RecipeError: A model's configuration is not to be had, or it cannot be followed.
    """
    section, settings, notes = getattr(recipe, stage), settings_of(recipe, stage, machine.count), []
    if launch.device != "cpu" and section.trainer.get("bf16") is False and not section.trainer.get("fp16"):
        launch = replace(launch, half=False)
    name = "policy" if stage in ("ppo", "rloo") else "model"
    reference = getattr(section, name)
    where = f"{stage}.{name}"
    config, start = config_of(recipe, where, "stage:sft" if reference is None else reference)
    if stage == "sft" and reference is None:
        start = None
    if stage != "reward" and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(
            f"{where}: {reference} is a {config.model_type} model, which writes no text; set a language model."
        )
    peft = None
    if section.peft is not None:
        peft = start if start is not None and stage != "reward" else lora_of(stage, section.peft)
    quantization = None
    if section.quantization is not None:
        quantization = quantization_of(stage, section.quantization, "bfloat16" if launch.half else "float32")
    dropout = stage == "sft" and _drops_out(config)
    batch = _batch(recipe, stage, settings, config, machine.count, notes)
    value, reward_models = None, ()
    how = {
        "classifier": stage == "reward",
        "peft_config": peft,
        "quantization_config": quantization,
        "dropout": dropout,
    }
    if stage in ("ppo", "rloo"):
        batch = replace(batch, reference=settings["beta"] != 0 and peft is None)
        value = _value_config(recipe, config) if stage == "ppo" else None
    with _followed(stage):
        if stage in ("ppo", "rloo"):
            reward_models = tuple(
                replace(
                    model_of(scorer, Launch(half=half, device=launch.device), classifier=True, trained=False),
                    loaded_bytes=2 if half else 4,
                )
                for scorer, half in _reward_model_configs(recipe, notes)
            )
        with loading(f"{stage}.peft", config.model_type):  # that names layers which are not there
            policy = model_of(config, launch, **how)
        network = value and model_of(value, launch, classifier=True)
    found = {
        flag: moments(policy, replace(batch, checkpointing=flag), launch, network, reward_models)
        for flag in (False, True)
    }
    given = section.trainer.get("gradient_checkpointing")
    totals = {flag: max(moment.total for moment in of_flag.values()) for flag, of_flag in found.items()}
    checkpointing = given if given is not None else machine.device != "cpu"
    return StagePlan(
        stage=stage,
        machine=machine,
        launch=launch,
        batch=replace(batch, checkpointing=checkpointing),
        moments=found[checkpointing],
        otherwise=totals[not checkpointing],
        work=_work(recipe, stage, settings, batch, machine.count),
        notes=notes,
    )


@contextmanager
def _followed(stage: str) -> Iterator[None]:
    """Around models that are followed without weights: of one that cannot be, whatever it raises is one sentence."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(
            f"{stage}: plan cannot follow one of its models ({type(error).__name__}: {str(error)[:200]}); the stage itself "
            "may run."
        ) from error


def _batch(
    recipe: Recipe, stage: str, settings: dict[str, Any], config: Any, processes: int, notes: list[str]
) -> Batch:
    rows, accumulation = settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
    optimizer = str(getattr(settings["optim"], "value", settings["optim"]))
    common = {"stage": stage, "accumulation": accumulation, "optimizer": optimizer}
    if stage in ("sft", "reward"):
        longest = min(settings["max_length"] or math.inf, context)
        if longest == math.inf:
            raise RecipeError(f"{stage}.trainer.max_length: set it; nothing else says how long texts may be.")
        return Batch(rows=rows * (2 if stage == "reward" else 1), prompt=int(longest), completion=0, **common)
    completion = settings["max_completion_length"]
    if completion >= context:
        raise RecipeError(
            f"{stage}.trainer.max_completion_length is {completion}, but the model reads {context} tokens at most, prompt "
            "included; set it to less."
        )
    prompt = _prompt_tokens(recipe, stage, context, completion, notes)
    rollout = rollout_size(stage, settings, processes)
    if settings["use_vllm"]:
        notes.append(f"{stage}: what vLLM keeps on the same GPUs is not counted; sampling is planned as without it.")
    sampled = min(settings["sampling_batch_size"] or rollout, rollout)
    return Batch(rows=rows, prompt=prompt, completion=completion, rollout=rollout, sampled=sampled, **common)


def _prompt_tokens(recipe: Recipe, stage: str, context: float, completion: int, notes: list[str]) -> int:
    data = recipe.data
    if data.max_prompt_tokens is not None:
        return data.max_prompt_tokens
    if data.prompt_template is None and "prompt" not in data.columns:
        if data.prompt_words is None:
            return data.prompt_tokens[1]
        notes.append(f"{stage}: two tokens a word of data.prompt_words are assumed.")
        return 2 * data.prompt_words[1]
    longest = int(min(context - completion, 1024))
    notes.append(
        f"{stage}: prompts of {longest} tokens are assumed; data.max_prompt_tokens would say how long they are."
    )
    return longest


def _value_config(recipe: Recipe, policy: Any) -> Any:
    source = recipe.ppo.value_model
    if source in OWN_VALUE_MODELS:
        return policy if source == "policy" else None
    return config_of(recipe, "ppo.value_model", source)[0]


def _reward_model_configs(recipe: Recipe, notes: list[str]) -> Iterator[tuple[Any, bool]]:
    """Configuration of every model that scores, and whether it is loaded in half precision."""
    for i, spec in enumerate(recipe.reward_funcs):
        model = spec.args.get("model")
        if spec.name in ("reward_model", "sentiment") and isinstance(model, str):
            half = spec.args.get("dtype") in ("bfloat16", "float16")
            yield config_of(recipe, f"reward_funcs.{i}.args.model", model)[0], half
        elif ":" in spec.name:
            notes.append(f"reward_funcs.{i}: what {spec.name} keeps in memory is not counted.")


def _work(recipe: Recipe, stage: str, settings: dict[str, Any], batch: Batch, processes: int) -> Work:
    section, given = getattr(recipe, stage), getattr(recipe, stage).trainer
    of_step = settings["per_device_train_batch_size"] * batch.accumulation * processes
    max_steps, epochs = settings["max_steps"], settings["num_train_epochs"]
    if stage in ("sft", "reward"):
        texts = 2 if stage == "reward" else 1
        data = (section.data if stage == "reward" else None) or recipe.data
        number, at_most = (section.pairs, True) if stage == "reward" and section.pairs else (data.max_rows, True)
        if max_steps > 0:
            rows, steps, at_most = max_steps * of_step, max_steps, False
        elif number is not None:
            rows, steps = math.ceil(number * epochs), math.ceil(math.ceil(number / of_step) * epochs)
        else:
            return Work(None, None, None, True)
        return Work(rows, steps, rows * texts * batch.prompt, at_most)
    of_rollout = batch.rollout * processes
    passes = settings["num_iterations"] * max(1, of_rollout // of_step)  # optimizer steps of a rollout
    if max_steps > 0:
        rollouts, steps = math.ceil(max_steps / passes), max_steps
    elif recipe.episodes is not None and "num_train_epochs" not in given:
        rollouts = math.ceil(recipe.episodes / of_rollout)
        steps = rollouts * passes
    elif recipe.data.max_rows is not None:
        rollouts = math.floor(recipe.data.max_rows * settings["num_generations"] / of_rollout * epochs)
        episodes = rollouts * of_rollout
        return Work(episodes, rollouts * passes, episodes * (batch.prompt + batch.completion), True)
    else:
        return Work(None, None, None, True)
    episodes = rollouts * of_rollout
    return Work(episodes, steps, episodes * (batch.prompt + batch.completion), False)

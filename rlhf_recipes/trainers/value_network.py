"""The value network of PPO: a head on the policy, or a model of its own. The policy's forward pass includes it."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from rlhf_recipes.models.load import load_model
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.scoring import stored_scoring
from rlhf_recipes.runs.references import loading

HEAD_FILE = "value_head.safetensors"


@dataclass
class PolicyOutput(ModelOutput):
    """Logits (B, T, vocabulary), values (B, T) of the same states, and the balancing loss of a mixture of experts.

    The values are the real part of `state_values`.
    """

    logits: Tensor | None = None
    state_values: Tensor | None = None
    aux_loss: Tensor | None = None


class ValueNetwork(nn.Module):
    """V(s_t): the value of the state before token t, at the position of the logits for token t.

    A new head is 0 everywhere, so that the first advantages are plain returns and not noise.

    Args:
        policy: The causal language model that gets the network as a submodule. Its forward pass (not its generation)
            then returns a `PolicyOutput`.
        model: A sequence classifier with one label, which is read at every position. None: a head on the policy's
            hidden states.
    """

    def __init__(self, policy: nn.Module, model: PreTrainedModel | None = None):
        super().__init__()
        self.model = model
        self.active = True
        """True: forward passes return values. False for the reference, which may be the same model."""
        self.detached = False
        """True while the network warms up: a head on the policy gives the policy's layers no gradient."""
        self._hidden_states: Tensor | None = None
        lm_head = policy.get_output_embeddings()
        if model is None:
            self.head = nn.Linear(lm_head.in_features, 1, dtype=torch.float32, device=policy.device)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
            lm_head.register_forward_pre_hook(self._remember)
        # DDP and DeepSpeed need the values among the outputs of the policy's own forward pass.
        policy.register_forward_hook(self._add_values, with_kwargs=True)
        policy.add_module("value_network", self)

    def _remember(self, lm_head: nn.Module, args: tuple) -> None:
        self._hidden_states = args[0]

    def _add_values(self, policy: nn.Module, args: tuple, kwargs: dict, outputs: ModelOutput) -> ModelOutput:
        hidden_states, self._hidden_states = self._hidden_states, None
        # Generation (it uses the cache) needs no values, but all fields of the model's own output.
        if kwargs.get("use_cache") is not False or not self.active:
            return outputs
        if self.model is None:
            values = self._values(self.head, hidden_states.detach() if self.detached else hidden_states)
        else:
            names = ("input_ids", "attention_mask", "position_ids")
            inputs = {name: kwargs[name] for name in names if name in kwargs}
            hidden_states = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            values = self._values(self.model.score, hidden_states[:, kwargs["logits_to_keep"]])
            values = values - getattr(self.model.config, "score_center", 0.0)  # as stage reward scores
        if isinstance(policy, FSDPModule):  # it would round every real output to its precision, such as bf16
            values = torch.complex(values, torch.zeros_like(values))
        return PolicyOutput(outputs.logits, values, getattr(outputs, "aux_loss", None))

    @staticmethod
    def _values(head: nn.Linear, hidden_states: Tensor) -> Tensor:
        # In float32, without autocast: neighbouring numbers of bf16 differ by 1 %, as much as advantages.
        with torch.autocast(hidden_states.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(hidden_states.float(), head.weight.float(), bias).squeeze(-1)

    def save(self, folder: Path, states: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes the network to a folder: a head as one file, a model as files for `from_pretrained`.

        Args:
            folder: The folder; it may not exist yet.
            states: This module's gathered state.
            tokenizer: Saved with a model.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if self.model is None:
            save_file({name: tensor.contiguous().cpu() for name, tensor in states.items()}, folder / HEAD_FILE)
        else:
            self.model.save_pretrained(
                folder, state_dict={name.removeprefix("model."): tensor for name, tensor in states.items()}
            )
            tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Reads the files of `save`."""
        if self.model is None:
            self.load_state_dict(load_file(folder / HEAD_FILE))
        else:
            saved = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=self.model.dtype, use_safetensors=True, trust_remote_code=False
            )
            self.model.load_state_dict(saved.state_dict())


def copy_of_policy(policy: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """A sequence classifier with one label on a copy of a causal language model's layers, with its adapter merged.

    Raises:
        ValueError: transformers has no sequence classifier of that architecture.
    """
    with _gathered(policy):
        policy = _merged_copy(policy) if is_peft_model(policy) else policy
        layers = copy.deepcopy(policy.base_model)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(
            f"value_model: transformers has no sequence classifier for {config.model_type}, which 'policy' needs; use "
            "'shared', a head on the policy."
        )
    with torch.device("meta"):  # random weights would cost time and random numbers
        model = AutoModelForSequenceClassification.from_config(config)
    setattr(model, model.base_model_prefix, layers)
    return _with_new_head(model)


def _gathered(model: nn.Module) -> AbstractContextManager:
    """Inside, every process has all weights of a model that ZeRO-3 shards."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def _merged_copy(policy: PeftModel) -> PreTrainedModel:
    if not getattr(policy, "is_loaded_in_4bit", False) and not getattr(policy, "is_loaded_in_8bit", False):
        return copy.deepcopy(policy).merge_and_unload().requires_grad_(True)
    # A value network trains, which quantized weights cannot: it takes the unquantized weights from disk.
    base = load_model(AutoModelForCausalLM, "value_model", policy.config.name_or_path, dtype=torch.float32)
    copied = get_peft_model(base, copy.deepcopy(policy.peft_config["default"]))
    set_peft_model_state_dict(copied, get_peft_model_state_dict(policy))
    return copied.merge_and_unload().requires_grad_(True)


def load_value_model(source: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A sequence classifier as the value network of a policy with this tokenizer; an instance is copied.

    A classifier with several labels gets a new head.

    Raises:
        RecipeError: The model has another tokenizer, is no sequence classifier, or looks ahead.
    """
    if isinstance(source, str):
        _check_tokenizer(source, tokenizer)
        model = load_model(
            AutoModelForSequenceClassification, "value_model", source, new_head=True, dtype=torch.float32
        )
        name, stored = source, stored_scoring(source)
        if stored is not None:
            model.config.score_center = stored.center  # so that values start as the reward model's scores
    else:
        model, name = copy.deepcopy(source), source.config.name_or_path or type(source).__name__
        if Path(name).is_dir() and (Path(name) / "tokenizer_config.json").is_file():
            _check_tokenizer(name, tokenizer)
    if getattr(model, "is_quantized", False):
        raise RecipeError(f"value_model: the weights of {name} are stored quantized, so they cannot be trained.")
    vocabulary = model.config.get_text_config().vocab_size
    if vocabulary < len(tokenizer):
        raise RecipeError(
            f"value_model: {name} has {vocabulary} tokens, the policy's tokenizer {len(tokenizer)}: it was trained with "
            "another tokenizer. Use 'shared' or 'policy', or a reward model with this policy's tokenizer."
        )
    if not isinstance(getattr(model, "score", None), nn.Linear) or _looks_ahead(model):
        raise RecipeError(
            f"value_model: {name} ({type(model).__name__}) is no causal sequence classifier: the value of a state would "
            "depend on later tokens. Use 'shared' or 'policy', or a reward model with a causal backbone."
        )
    return model if model.score.out_features == 1 else _with_new_head(model)


def _check_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with loading("value_model", source):
        other = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if other.get_vocab() != tokenizer.get_vocab():
        raise RecipeError(
            f"value_model: {source} has another tokenizer ({len(other)} tokens) than the policy ({len(tokenizer)}), so it "
            "cannot read the policy's tokens. Use 'shared' or 'policy', or a reward model with this policy's tokenizer."
        )


def _looks_ahead(model: PreTrainedModel) -> bool:
    """Whether a hidden state depends on a later token."""
    ids = torch.arange(2, 10, device=model.device)[None] % model.config.get_text_config().vocab_size
    changed = ids.clone()
    changed[0, -1] = 1
    was_training = model.training
    model.eval()
    with torch.no_grad(), _gathered(model):
        whole = torch.ones_like(ids)  # otherwise transformers warns of pad tokens
        first, second = (model.base_model(i, attention_mask=whole).last_hidden_state[:, :-1] for i in (ids, changed))
    model.train(was_training)
    return not torch.allclose(first, second, atol=1e-4)


def _with_new_head(model: PreTrainedModel) -> PreTrainedModel:
    hidden_size = model.score.in_features
    model.score = nn.Linear(hidden_size, 1, bias=False, dtype=model.base_model.dtype, device=model.base_model.device)
    nn.init.zeros_(model.score.weight)
    model.config.num_labels = 1
    return model

"""Sequence classifiers that score texts: loading, labels, logits."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from rlhf_recipes.models.load import load_model
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.references import loading

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


def load_classifier(
    name: str, model: str, tokenizer: Any = None, trust_remote_code: bool = False, dtype: Dtype = "float32"
) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """A classifier on this process's device, and the tokenizer that reads for it.

    Args:
        name: The reward function that wants it, for messages.
        model: Hub id or folder.
        tokenizer: None: the model's own.
        trust_remote_code: Whether Python code that comes with the model may run.
        dtype: What the model computes in.

    Raises:
        RecipeError: It cannot be loaded, or is no trained classifier.
    """
    from transformers import AutoModelForSequenceClassification

    key = f"reward_funcs: {name}: model"
    classifier = load_model(AutoModelForSequenceClassification, key, model, trust_remote_code, dtype=dtype)
    return placed(classifier), tokenizer or own_tokenizer(name, model, trust_remote_code)


def own_tokenizer(name: str, model: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """The tokenizer that was saved with a model; arguments as in `load_classifier`."""
    from transformers import AutoTokenizer

    with loading(f"reward_funcs: {name}: model", model):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)


def placed(classifier: Any) -> Any:
    """The classifier on this process's device, without dropout."""
    from accelerate import PartialState

    device = PartialState().device
    return (classifier if classifier.device == device else classifier.to(device)).eval()


def batch_logits(
    classifier: Any, tokenizer: "PreTrainedTokenizerBase", texts: list[str], batch_size: int, max_length: int | None
) -> Iterator["Tensor"]:
    """Logits (batch, labels) of every batch of texts, float32."""
    import torch

    for start in range(0, len(texts), batch_size):
        inputs = tokenizer(
            texts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            truncation=max_length is not None,
            max_length=max_length,
        ).to(classifier.device)
        with torch.inference_mode():
            yield classifier(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()


def label_index(model: str, config: Any, label: str | int) -> int:
    """The number of a label that is given by name, in any case, or by number.

    Raises:
        RecipeError: The model has no such label.
    """
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    names = [str(name) for name in config.id2label.values()]
    for index, name in zip(config.id2label, names, strict=True):
        if name.lower() == str(label).lower():
            return index
    raise RecipeError(f"reward_funcs.args.label: {model} has no label {label!r}; it has: {', '.join(names)}.")

"""Loads sequence classifiers that score texts, finds their labels, and computes their values."""

from typing import TYPE_CHECKING, Any, Literal

from rlhf_recipes.models.load import load_model
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.references import loading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Dtype = Literal["float32", "bfloat16", "float16", "auto"]


def load_classifier(
    name: str, model_id: str, tokenizer: Any = None, trust_remote_code: bool = False, dtype: Dtype = "float32"
) -> tuple[Any, "PreTrainedTokenizerBase"]:
    """Loads a classifier onto this process's device, and its tokenizer.

    Args:
        name: The reward function that needs it, for messages.
        model_id: Folder or Hub id.
        tokenizer: None: the model's own.
        trust_remote_code: Whether Python code in the model's repository may run.
        dtype: Type of the weights.

    Raises:
        RecipeError: The model cannot be loaded, or it is no trained classifier.
    """
    from transformers import AutoModelForSequenceClassification

    key = f"reward_funcs: {name}: model"
    classifier = load_model(AutoModelForSequenceClassification, key, model_id, trust_remote_code, dtype=dtype)
    return on_device(classifier), tokenizer or own_tokenizer(name, model_id, trust_remote_code)


def own_tokenizer(name: str, model_id: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads the tokenizer that was saved with a model; arguments as in `load_classifier`."""
    from transformers import AutoTokenizer

    with loading(f"reward_funcs: {name}: model", model_id):
        return AutoTokenizer.from_pretrained(model_id, trust_remote_code=trust_remote_code)


def on_device(classifier: Any) -> Any:
    """Moves a classifier to this process's device and turns its dropout off."""
    from accelerate import PartialState

    device = PartialState().device
    return (classifier if classifier.device == device else classifier.to(device)).eval()


def label_values(
    classifier: Any,
    rows: list[list[int]],
    pad_token_id: int,
    batch_size: int,
    label: int = 0,
    probability: bool = False,
) -> list[float]:
    """The logit or probability of one label for every text.

    Args:
        rows: Token ids of every text. A batch holds texts of similar length, so that there is little padding.
        batch_size: Texts per forward pass.
        label: Number of the label.
    """
    import torch

    from rlhf_recipes.models.forward import pad_batch

    # A classifier on a causal backbone reads the last token that is not padding, so it must know the pad token.
    classifier.config.get_text_config().pad_token_id = pad_token_id
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    values = [0.0] * len(rows)
    for start in range(0, len(rows), batch_size):
        batch = order[start : start + batch_size]
        ids, mask, _ = pad_batch([[] for _ in batch], [rows[i] for i in batch], pad_token_id)
        with torch.inference_mode():
            logits = classifier(input_ids=ids.to(classifier.device), attention_mask=mask.to(classifier.device)).logits
        logits = logits.float().softmax(-1) if probability else logits.float()
        for i, value in zip(batch, logits[:, label].tolist(), strict=True):
            values[i] = value
    return values


def label_index(model_id: str, config: Any, label: str | int) -> int:
    """The number of a label, which is given by number or by name. Upper and lower case of a name are equal.

    Raises:
        RecipeError: The model has no such label.
    """
    if isinstance(label, int) and 0 <= label < config.num_labels:
        return label
    names = [str(name) for name in config.id2label.values()]
    for index, name in zip(config.id2label, names, strict=True):
        if name.lower() == str(label).lower():
            return index
    raise RecipeError(f"reward_funcs.args.label: {model_id} has no label {label!r}; it has: {', '.join(names)}.")

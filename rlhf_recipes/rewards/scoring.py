"""The text format that a reward model was trained on, which stage reward stores beside the model.

A reward model gives one number, at the last token that is not padding. The number means something only if the text has
the format of the training texts: with an EOS at its end or not, in a chat template or not. The model also gives a number
for a text in another format. (Source: TRL's RewardTrainer, `_prepare_dataset` and `DataCollatorForPreference`.)
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.sections import Section
from rlhf_recipes.runs.files import SCORING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scoring(Section):
    """The text format that a reward model was trained on."""

    format: Literal["text", "chat"] | None
    """Plain texts or chat messages. None, which is never stored: unknown, so the model takes both."""
    append_eos: bool
    """Whether a finished plain text ends with the EOS token. The chat template decides how a chat ends."""
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str
    pad_token_id: int
    padding_side: Literal["left", "right"]
    max_length: int | None
    """Longest text in tokens; training left out longer ones. None: no limit."""
    chat_template_sha256: str | None
    """Checksum of the tokenizer's chat template. None: trained on plain texts."""
    center: float
    """Subtracted from the model's output, so that held-out texts have mean 0."""

    @property
    def ending(self) -> str:
        """The end of a finished plain text."""
        return self.eos_token or "" if self.append_eos else ""

    def write(self, folder: Path) -> None:
        (folder / SCORING).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def check_tokenizer(self, model_id: str, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Refuses a tokenizer that would give the model texts in another format.

        Raises:
            RecipeError: Names the model and everything that differs.
        """
        found = []
        if self.padding_side != "right":
            found.append(f"it was padded on the {self.padding_side}, and only right padding is supported")
        vocabulary = tokenizer.get_vocab()
        for kind in ("eos", "pad"):
            token, number = getattr(self, f"{kind}_token"), getattr(self, f"{kind}_token_id")
            if token is not None and vocabulary.get(token) != number:
                there = f"has it as {vocabulary[token]}" if token in vocabulary else "does not have it"
                found.append(f"its {kind} token was {token!r} ({number}), and the tokenizer {there}")
        if self.format == "chat" and _template_sha256(tokenizer) != self.chat_template_sha256:
            which = "another one" if tokenizer.chat_template else "none"
            found.append(f"it was trained with a chat template, and the tokenizer has {which}")
        if found:
            raise RecipeError(
                f"reward_funcs: reward_model: {model_id} cannot be read as {SCORING} says it was trained: "
                f"{'; '.join(found)}. Use the tokenizer that stage reward saved with it, or run stage reward again."
            )


def trained_scoring(trainer: Any, chat: bool, center: float) -> Scoring:
    """The format in which TRL's RewardTrainer gives texts to its model.

    Args:
        trainer: The `RewardTrainer`.
        chat: Whether its rows are chat messages.
        center: Mean score of held-out texts, or 0.
    """
    pad_token_id = trainer.data_collator.pad_token_id
    return _scoring(trainer.processing_class, "chat" if chat else "text", pad_token_id, trainer.args.max_length, center)


def stored_scoring(model_id: str) -> Scoring | None:
    """Reads the format stored beside the model in this folder or Hub repository; None if there is none.

    Raises:
        RecipeError: The file is damaged.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(model_id, SCORING)
    except OSError:  # the model has no such file, or there is no network and the cache has none
        path = None
    if path is None:
        return None
    try:
        return Scoring.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        found = "; ".join(": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors())
        raise RecipeError(
            f"{path} is damaged ({found}). Run stage reward again, or delete the file to have the model read as TRL's "
            "RewardTrainer trains."
        ) from error


def assumed_scoring(classifier: "PreTrainedModel", tokenizer: Any) -> Scoring:
    """The most likely format of a model without a file: that of TRL's RewardTrainer.

    The model's own pad token counts, even if the tokenizer has another one: the model finds the last token by it.
    """
    config = classifier.config
    pad_token_id = config.get_text_config().pad_token_id
    if pad_token_id is None or not 0 <= pad_token_id < len(tokenizer):
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return _scoring(tokenizer, None, pad_token_id, None, getattr(config, "score_center", 0.0))


def _scoring(
    tokenizer: Any,
    format: Literal["text", "chat"] | None,
    pad_token_id: int,
    max_length: int | None,
    center: float,
) -> Scoring:
    return Scoring(
        format=format,
        append_eos=format != "chat" and tokenizer.eos_token is not None,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.convert_ids_to_tokens(pad_token_id),
        pad_token_id=pad_token_id,
        padding_side="right",
        max_length=max_length,
        chat_template_sha256=_template_sha256(tokenizer) if format == "chat" else None,
        center=center,
    )


def _template_sha256(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    return template and hashlib.sha256(template.encode()).hexdigest()

"""How a reward model reads a text: what stage reward trained it to read, stored beside it, and followed when it scores.

A reward model gives one number, at the last token that is not padding. Which token that is, and what stands before it,
is a matter of the texts that it was trained on: with an EOS behind them or not, in a chat template or not. Read another
way, it still gives a number. (Source: TRL's RewardTrainer, `_prepare_dataset` and `DataCollatorForPreference`.)
"""

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from rlhf_recipes.data.tokenizer import context_length
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError, Section
from rlhf_recipes.rewards.calls import RewardError
from rlhf_recipes.runs.files import SCORING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Scoring(Section):
    """The format of text that a reward model was trained to read."""

    format: Literal["text", "chat"] | None
    """Plain texts or chat messages. None, never stored: not known, it takes either."""
    append_eos: bool
    """Whether a finished text ends with the EOS token; that of chat messages is the template's matter."""
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str
    pad_token_id: int
    padding_side: Literal["left", "right"]
    max_length: int | None
    """Longest text in tokens; longer ones were left out of the training. None: none was."""
    chat_template_sha256: str | None
    """Of the template's text, which is the tokenizer's. None: trained on plain texts."""
    center: float
    """Subtracted from the model's output, so that held-out texts have mean 0."""

    def write(self, folder: Path) -> None:
        (folder / SCORING).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def trained_scoring(trainer: Any, chat: bool, center: float) -> Scoring:
    """The format of text that TRL's RewardTrainer trained its model to read.

    Args:
        trainer: The `RewardTrainer`.
        chat: Whether its rows are chat messages.
        center: Mean score of held-out texts, or 0.
    """
    tokenizer = trainer.processing_class
    return Scoring(
        format="chat" if chat else "text",
        append_eos=not chat,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.pad_token,
        pad_token_id=trainer.data_collator.pad_token_id,
        padding_side="right",
        max_length=trainer.args.max_length,
        chat_template_sha256=_sha256(tokenizer.get_chat_template()) if chat else None,
        center=center,
    )


def stored_scoring(model: str) -> Scoring | None:
    """Reads the format stored beside the model in this folder or Hub repository; None if there is none.

    Raises:
        RecipeError: It is damaged.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(model, SCORING)
    except OSError:  # no such file, or no network and none in the cache; the log says that there is none
        return None
    try:
        return Scoring.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        found = "; ".join(": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors())
        raise RecipeError(
            f"{path} is damaged ({found}). Run stage reward again, or delete the file to have the model read as TRL's "
            "RewardTrainer trains."
        ) from error


def assumed_scoring(classifier: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> Scoring:
    """The most likely format for a model without a file: that of TRL's RewardTrainer.

    Where the tokenizer's pad token is not the one that the model was saved with, the model's counts: it reads by it.
    """
    config = classifier.config
    pad_token_id = config.get_text_config().pad_token_id
    if pad_token_id is None or not 0 <= pad_token_id < len(tokenizer):
        pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Scoring(
        format=None,
        append_eos=tokenizer.eos_token is not None,
        eos_token=tokenizer.eos_token,
        eos_token_id=tokenizer.eos_token_id,
        pad_token=tokenizer.convert_ids_to_tokens(pad_token_id),
        pad_token_id=pad_token_id,
        padding_side="right",
        max_length=None,
        chat_template_sha256=None,
        center=getattr(config, "score_center", 0.0),
    )


def reader(
    model: str,
    classifier: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    batch_size: int,
    max_length: int | None,
    scoring: Scoring | None = None,
) -> Callable[..., list[float]]:
    """A reward function that has a reward model read texts as it was trained to; the log says how that is.

    A text that was cut off gets no EOS, and its chat turn stays open: it is not read as a finished one.

    Args:
        model: Folder or Hub id that the model came from, where its `scoring.json` may be, and for messages.
        classifier: The reward model; its `pad_token_id` is set to the one it was trained with.
        tokenizer: Its own tokenizer.
        batch_size: Texts a forward pass.
        max_length: Longer texts lose their beginning. None: as long as the training's, and the model's context.
        scoring: How it was trained to read. None: as is stored beside it, or else as TRL's RewardTrainer trains.

    Raises:
        RecipeError: What is stored cannot be followed with this model and tokenizer.
    """
    stored = scoring or (stored_scoring(model) if model else None)
    scoring = stored or assumed_scoring(classifier, tokenizer)
    if classifier.config.num_labels != 1:
        raise RecipeError(
            f"reward_funcs.name: reward_model: {model} has {classifier.config.num_labels} labels, a reward model has "
            "one; use sentiment with one of its labels."
        )
    if stored:
        _check_tokenizer(model, stored, tokenizer)
    longest = _longest(model, scoring, classifier, tokenizer, max_length)
    # A classifier on a causal backbone reads the last token that is not padding: it must know which one pads.
    classifier.config.get_text_config().pad_token_id = scoring.pad_token_id
    logger.info("%s", _described(model, scoring, stored is not None, longest))

    def score(prompts, completions, finished, **columns) -> list[float]:
        rows = [
            _token_ids(model, scoring, tokenizer, *sample)
            for sample in zip(prompts, completions, finished, strict=True)
        ]
        cut = sum(len(row) > longest for row in rows)
        if cut:
            logger.warning(
                "reward_model: %s: %d of %d texts lose their beginning: they are longer than the %d tokens that it reads.",
                model,
                cut,
                len(rows),
                longest,
            )
            rows = [_cut(row, longest, tokenizer) for row in rows]
        # By length: short texts are not padded to the length of long ones.
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        values = [0.0] * len(rows)
        for start in range(0, len(rows), batch_size):
            batch = order[start : start + batch_size]
            for i, value in zip(batch, _read(classifier, [rows[i] for i in batch], scoring.pad_token_id), strict=True):
                values[i] = value - scoring.center
        return values

    return score


def _check_tokenizer(model: str, scoring: Scoring, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer with which the model would not read what it was trained to."""
    found = []
    if scoring.padding_side != "right":
        found.append(f"it was padded on the {scoring.padding_side}, and only right padding can be followed")
    vocabulary = tokenizer.get_vocab()
    for kind in ("eos", "pad"):
        token, number = getattr(scoring, f"{kind}_token"), getattr(scoring, f"{kind}_token_id")
        if token is not None and vocabulary.get(token) != number:
            there = f"has it as {vocabulary[token]}" if token in vocabulary else "does not have it"
            found.append(f"its {kind} token was {token!r} ({number}), and the tokenizer {there}")
    if scoring.format == "chat":
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        if template is None or _sha256(template) != scoring.chat_template_sha256:
            which = "another one" if template else "none"
            found.append(f"it was trained with a chat template, and the tokenizer has {which}")
    if found:
        raise RecipeError(
            f"reward_funcs: reward_model: {model} cannot be read as {SCORING} says it was trained: {'; '.join(found)}. "
            "Use the tokenizer that stage reward saved with it, or run stage reward again."
        )


def _longest(
    model: str,
    scoring: Scoring,
    classifier: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
) -> float:
    """Longest text in tokens that is read whole; infinite where nothing limits it."""
    context = context_length(classifier.config, tokenizer)
    trained = min(scoring.max_length or context, context)
    if max_length is None:
        return trained
    if max_length > context:
        raise RecipeError(
            f"reward_funcs: reward_model: max_length is {max_length}, but {model} reads {context} tokens at most; leave it out."
        )
    if scoring.format is not None and max_length < trained:
        raise RecipeError(
            f"reward_funcs: reward_model: max_length is {max_length}, but {model} was trained on whole texts of up to "
            f"{trained} tokens ({SCORING}); leave it out, or train with reward.trainer.max_length={max_length}."
        )
    return max_length


def _described(model: str, scoring: Scoring, stored: bool, longest: float) -> str:
    """One line on how a model is read."""
    eos = "no EOS" if scoring.eos_token is None else f"EOS {scoring.eos_token!r} ({scoring.eos_token_id})"
    texts = f"plain texts, {eos} " + ("behind finished ones" if scoring.append_eos else "not appended")
    chats = "chat messages in its template, the last turn closed where it is finished"
    return (
        f"reward_model: {model}: "
        + (f"read as its {SCORING} says: " if stored else f"no {SCORING}, so read as TRL's RewardTrainer trains: ")
        + {"text": texts, "chat": chats, None: f"{texts}; {chats}"}[scoring.format]
        + f"; padded on the right with {scoring.pad_token!r} ({scoring.pad_token_id})"
        + (", which is EOS, so that finished and cut-off texts read alike" if _pads_with_eos(scoring) else "")
        + ("" if math.isinf(longest) else f"; {longest} tokens at most")
        + (f"; minus {scoring.center:.4g}." if scoring.center else ".")
    )


def _pads_with_eos(scoring: Scoring) -> bool:
    return scoring.format != "chat" and scoring.append_eos and scoring.pad_token_id == scoring.eos_token_id


def _token_ids(
    model: str,
    scoring: Scoring,
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str | list[dict],
    completion: str | list[dict],
    finished: bool,
) -> list[int]:
    """Token ids of one text, by the same calls as in TRL's RewardTrainer."""
    chat = not isinstance(prompt, str)
    if scoring.format is not None and chat != (scoring.format == "chat"):
        kinds = ("plain texts", "chat messages")
        raise RewardError(
            f"reward_funcs: reward_model: {model} was trained on {kinds[not chat]} ({SCORING}), and is given {kinds[chat]}; "
            "use prompts of that kind, or run stage reward on pairs of the other."
        )
    if chat and tokenizer.chat_template:
        messages = {"tokenize": True, "return_dict": True, "continue_final_message": not finished}
        return tokenizer.apply_chat_template(prompt + completion, **messages)["input_ids"]
    end = as_text(completion)
    if finished and scoring.append_eos and not end.endswith(scoring.eos_token):
        end += scoring.eos_token
    ids = tokenizer(as_text(prompt) + ("\n" if chat else "") + end)["input_ids"]
    if not finished and ids[-1:] == [scoring.eos_token_id] and tokenizer.cls_token_id is None:
        # Some tokenizers put one behind every text. In an encoder's [CLS] ... [SEP] it is no sign of an end.
        ids = ids[:-1]
    if not ids:
        raise RewardError(
            f"reward_funcs: reward_model: {model} is given an empty text, in which there is nothing to read."
        )
    return ids


def _cut(ids: list[int], longest: int, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The last tokens, where the score is read; a BOS or [CLS] at the beginning stays."""
    if len(ids) <= longest:
        return ids
    first = ids[:1] if ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id) else []
    return first + ids[len(ids) - longest + len(first) :]


def _read(classifier: "PreTrainedModel", rows: list[list[int]], pad_token_id: int) -> list[float]:
    """The model's number for every row of token ids."""
    import torch

    from rlhf_recipes.models.forward import pad_batch

    ids, mask, _ = pad_batch([[] for _ in rows], rows, pad_token_id)
    with torch.inference_mode():
        logits = classifier(input_ids=ids.to(classifier.device), attention_mask=mask.to(classifier.device)).logits
    return logits[:, 0].float().tolist()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

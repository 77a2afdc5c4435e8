"""Scores texts with a reward model, in the format that the model was trained on."""

import logging
import math
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.tokenizer import context_length
from rlhf_recipes.recipe.messages import as_text
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards.checked import RewardError
from rlhf_recipes.rewards.classifier import label_values
from rlhf_recipes.rewards.scoring import Scoring, assumed_scoring, stored_scoring
from rlhf_recipes.runs.files import SCORING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class RewardModelReader:
    """A reward function: the scores of a reward model. The log says in which format the model reads texts.

    A text that was cut off gets no EOS, and its chat turn stays open, so the model does not take it for a finished one.
    """

    def __init__(
        self,
        model_id: str,
        classifier: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        batch_size: int,
        max_length: int | None,
        scoring: Scoring | None = None,
    ):
        """Prepares the model.

        Args:
            model_id: Folder or Hub id of the model, which may hold a `scoring.json`. "": unknown.
            classifier: The reward model. Its `pad_token_id` becomes that of the training.
            tokenizer: The model's own.
            batch_size: Texts per forward pass.
            max_length: Longest text in tokens; longer texts lose their beginning. None: the limit of the training or of
                the model's context.
            scoring: The format of the training. None: the stored one, or else that of TRL's RewardTrainer.

        Raises:
            RecipeError: The classifier is no reward model, or the stored format does not fit the tokenizer or max_length.
        """
        stored = scoring or (stored_scoring(model_id) if model_id else None)
        if classifier.config.num_labels != 1:
            raise RecipeError(
                f"reward_funcs.name: reward_model: {model_id} has {classifier.config.num_labels} labels, a reward model has "
                "one; use sentiment with one of its labels."
            )
        if classifier.config.is_encoder_decoder:
            raise RecipeError(
                f"reward_funcs.name: reward_model: {model_id} is an encoder-decoder, which reads its score at EOS, and a "
                "cut-off text has none; use a decoder or an encoder."
            )
        if stored:
            stored.check_tokenizer(model_id, tokenizer)
        self.__name__ = model_id.split("/")[-1] or type(classifier).__name__
        self._model_id, self._classifier, self._batch_size = model_id, classifier, batch_size
        self.tokenizer: Any = tokenizer  # transformers declares one return type for all options of its methods
        self._scoring = stored or assumed_scoring(classifier, tokenizer)
        self._longest = self._limit(max_length)
        source = f"read as its {SCORING} says" if stored else f"no {SCORING}, so read as TRL's RewardTrainer trains"
        logger.info("reward_model: %s: %s: %s", model_id, source, self._format())

    def __call__(self, prompts: list, completions: list, finished: list[bool], **columns: Any) -> list[float]:
        rows = [self._token_ids(*text) for text in zip(prompts, completions, finished, strict=True)]
        too_long = sum(len(row) > self._longest for row in rows)
        if too_long:
            logger.warning(
                "reward_model: %s: %d of %d texts lose their beginning: they are longer than the %d tokens that it reads.",
                self._model_id,
                too_long,
                len(rows),
                self._longest,
            )
            rows = [self._cut(row) for row in rows]
        outputs = label_values(self._classifier, rows, self._scoring.pad_token_id, self._batch_size)
        return [output - self._scoring.center for output in outputs]

    def _limit(self, max_length: int | None) -> float:
        """Longest text in tokens that is read whole; infinite if nothing limits it."""
        context = context_length(self._classifier.config, self.tokenizer)
        trained = min(self._scoring.max_length or context, context)
        if max_length is None:
            return trained
        if max_length > context:
            raise RecipeError(
                f"reward_funcs: reward_model: max_length is {max_length}, but {self._model_id} reads {context} tokens at "
                "most; leave it out."
            )
        if self._scoring.format is not None and max_length < trained:
            raise RecipeError(
                f"reward_funcs: reward_model: max_length is {max_length}, but {self._model_id} was trained on whole texts of "
                f"up to {trained} tokens ({SCORING}); leave it out, or train with "
                f"reward.trainer.max_length={max_length}."
            )
        return max_length

    def _format(self) -> str:
        """One line for the log."""
        s = self._scoring
        eos = "no EOS" if s.eos_token is None else f"EOS {s.eos_token!r} ({s.eos_token_id})"
        texts = f"plain texts, {eos} " + ("at the end of finished ones" if s.append_eos else "not appended")
        chats = "chat messages in its template, the last turn closed if it is finished"
        line = {"text": texts, "chat": chats, None: f"{texts}; {chats}"}[s.format]
        line += f"; padded on the right with {s.pad_token!r} ({s.pad_token_id})"
        if s.format != "chat" and s.append_eos and s.pad_token_id == s.eos_token_id:
            line += ", which is EOS, so finished and cut-off texts look the same"
        if not math.isinf(self._longest):
            line += f"; {self._longest} tokens at most"
        return line + (f"; minus {s.center:.4g}." if s.center else ".")

    def _token_ids(self, prompt: Any, completion: Any, finished: bool) -> list[int]:
        """Token ids of one text, by the same calls as in TRL's RewardTrainer."""
        scoring, tokenizer, chat = self._scoring, self.tokenizer, not isinstance(prompt, str)
        if scoring.format is not None and chat != (scoring.format == "chat"):
            kinds = ("plain texts", "chat messages")
            raise RewardError(
                f"reward_funcs: reward_model: {self._model_id} was trained on {kinds[not chat]} ({SCORING}), and is "
                f"given {kinds[chat]}; use prompts of that kind, or run stage reward on pairs of the other."
            )
        if chat and tokenizer.chat_template:
            messages = {"tokenize": True, "return_dict": True, "continue_final_message": not finished}
            return tokenizer.apply_chat_template(prompt + completion, **messages)["input_ids"]
        end = as_text(completion)
        if finished and not end.endswith(scoring.ending):
            end += scoring.ending
        ids = tokenizer(as_text(prompt) + ("\n" if chat else "") + end)["input_ids"]
        if not finished and ids[-1:] == [scoring.eos_token_id] and tokenizer.cls_token_id is None:
            # Some tokenizers append EOS to every text. An encoder's [CLS] ... [SEP] does not mean that a text ended.
            ids = ids[:-1]
        if not ids:
            raise RewardError(
                f"reward_funcs: reward_model: {self._model_id} is given an empty text and cannot score it."
            )
        return ids

    def _cut(self, ids: list[int]) -> list[int]:
        """The last tokens, where the score is read; a BOS or [CLS] at the beginning stays."""
        if len(ids) <= self._longest:
            return ids
        first = ids[:1] if ids[0] in (self.tokenizer.bos_token_id, self.tokenizer.cls_token_id) else []
        return first + ids[len(ids) - int(self._longest) + len(first) :]

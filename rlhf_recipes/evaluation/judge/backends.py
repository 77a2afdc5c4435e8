"""Who says which of two completions is better: an endpoint, a language model on this machine, or a reward model."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from rlhf_recipes.evaluation.judge.clients import Anthropic, OpenAI
from rlhf_recipes.evaluation.judge.parse import Answer, Question
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.trust import runs_own_code
from rlhf_recipes.runs.files import MANIFEST
from rlhf_recipes.runs.references import SNAPSHOT, is_hub_model, resolve_model
from rlhf_recipes.system.files import stamp_of
from rlhf_recipes.system.terminal import hush_libraries


class Backend(Protocol):
    """A judge. Making one asks nothing, and needs neither a key nor a package."""

    identity: dict[str, Any]
    """Everything an answer depends on, apart from the question."""
    labels: tuple[str, ...]
    """The answers it can give; () for a reward model, which gives numbers."""

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        """Answers in any order, each as soon as it is there.

        Raises:
            RecipeError: No further answer can be given; begins with the key to change.
        """


def backend_of(recipe: Recipe) -> Backend:
    """The backend that `judge.backend` names.

    Raises:
        RecipeError: No model is set, or an address in the environment cannot be used.
    """
    settings = recipe.judge
    if settings.model is None:
        what = "a model id" if settings.backend in ("local", "reward_model") else "the endpoint's name of a model"
        raise RecipeError(f"judge.model: {settings.backend} needs one; set judge.model to {what}.")
    if settings.backend == "openai":
        return OpenAI(settings)
    if settings.backend == "anthropic":
        return Anthropic(settings)
    return Local(recipe, settings.model) if settings.backend == "local" else RewardModel(recipe, settings.model)


class LocalBackend:
    """A model on this machine, known by its weights: tomorrow the same model id may stand for others."""

    def __init__(self, recipe: Recipe, model: str):
        self.recipe, self.model, self.batch_size = recipe, model, recipe.judge.batch_size
        self.trusted = runs_own_code(recipe, model)
        weights = _fingerprint_of_folder(recipe, model)
        self.identity = {"backend": recipe.judge.backend, "model": model, "weights": weights}

    def _folder(self) -> str:
        hush_libraries()
        return resolve_model(self.recipe, "judge.model", self.model)


class Local(LocalBackend):
    """A causal language model, whose next token alone is read: A or B, whichever is likelier.

    Small and base models seldom answer in the form that the question asks for, but they always lean to one of the two
    labels. The question does not offer `tie`: a model that cannot decide answers by position, and is inconsistent. A
    tie is the answer only where both labels are equally likely, as the coarse numbers of bfloat16 can make them.
    """

    labels: tuple[str, ...] = ("A", "B")

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        import torch
        from accelerate import PartialState
        from transformers import AutoModelForCausalLM

        from rlhf_recipes.data.tokenizer import context_length, load_tokenizer
        from rlhf_recipes.models.forward import completion_logits, pad_batch
        from rlhf_recipes.models.load import load_model

        folder = self._folder()
        tokenizer = load_tokenizer(self.recipe, "judge.model", self.model)
        prefix, tokens = _label_tokens(tokenizer, self.model)
        rows = sorted(((_prompt_ids(tokenizer, q["text"]) + prefix, q) for q in questions), key=lambda row: len(row[0]))
        model = load_model(AutoModelForCausalLM, "judge.model", folder, self.trusted, dtype="auto")
        model = model.to(PartialState().device).eval()
        context, longest = context_length(model.config, tokenizer), len(rows[-1][0])
        if longest > context:
            raise RecipeError(
                f"judge.model: {self.model} reads {context} tokens at most, and the longest question has {longest}; "
                "take another model, or shorten judge.criterion."
            )
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            ids, mask, _ = pad_batch([row for row, _ in batch], [tokens[:1]] * len(batch), tokenizer.pad_token_id)
            with torch.inference_mode():
                logits, _ = completion_logits(model, ids.to(model.device), mask.to(model.device), 1)
            for (_, question), (a, b) in zip(batch, logits[:, 0, tokens].tolist(), strict=True):
                yield question, {"text": "tie" if a == b else "A" if a > b else "B", "cut": False}


class RewardModel(LocalBackend):
    """A reward model: it scores every completion alone, as it was trained to, so there is no order to swap."""

    labels: tuple[str, ...] = ()

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        from rlhf_recipes.rewards.calls import call_all
        from rlhf_recipes.rewards.checked import checked
        from rlhf_recipes.rewards.functions import reward_model

        model = reward_model(self._folder(), batch_size=self.batch_size, trust_remote_code=self.trusted)
        function = checked(model, "judge", may_skip=False)
        for start in range(0, len(questions), self.batch_size):
            batch = questions[start : start + self.batch_size]
            (scores,) = call_all(
                [function],
                prompts=[question["prompt"] for question in batch],
                completions=[question["completion"] for question in batch],
                completion_ids=[[] for _ in batch],  # the policy's, which a reward model does not read
                finished=[question["finished"] for question in batch],
            )
            yield from zip(batch, ({"score": score} for score in scores), strict=True)


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    from rlhf_recipes.data.tokenizer import token_ids

    if tokenizer.chat_template:
        return token_ids(tokenizer, [{"role": "user", "content": text}])
    ids = token_ids(tokenizer, f"{text}\n\nAnswer:")
    # Some tokenizers put EOS behind every text; a model says nothing after it.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _label_tokens(tokenizer: Any, model: str) -> tuple[list[int], list[int]]:
    """Tokens that both answers begin with, and the first token that tells A from B, as they stand behind a question."""
    from rlhf_recipes.data.tokenizer import token_ids

    before: list[int] = []
    if tokenizer.chat_template:
        # The template shows what stands before an answer: nothing, a blank, or the marks of no thoughts.
        chat = [{"role": "user", "content": "A or B?"}]
        before = token_ids(tokenizer, chat)
        answered = ([*chat, {"role": "assistant", "content": label}] for label in Local.labels)
        a, b = (tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in answered)
    else:
        a, b = (tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in Local.labels)
    same = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
    if same is None or tokenizer.unk_token_id in (a[same], b[same]):
        raise RecipeError(f"judge.model: {model} has no tokens for A and B, so it cannot answer; take another model.")
    prefix = a[len(before) : same] if a[: len(before)] == before else []
    return prefix, [a[same], b[same]]


def _fingerprint_of_folder(recipe: Recipe, model: str) -> str | None:
    """Changes with the weights in a folder; None for a model of the Hub, which its name identifies.

    Names, sizes and times of files: reading a large model's weights for a hash would take longer than asking it.
    """
    if is_hub_model(model):
        return None
    from rlhf_recipes.models.load import adapter_of, base_of

    folder = resolve_model(recipe, "judge.model", model)
    adapter = adapter_of("judge.model", folder)
    folders = [folder] if adapter is None else [folder, base_of("judge.model", folder, adapter)]
    files = [
        stamp_of(path)
        for folder in folders
        for pattern in SNAPSHOT
        for path in sorted(Path(folder).glob(pattern))
        if path.name != MANIFEST
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()

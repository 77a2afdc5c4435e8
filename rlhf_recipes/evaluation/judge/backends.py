"""Who is asked which of two completions is better: endpoints over HTTP, a language model here, or a reward model.

A backend has an `identity`, what its answers depend on beside the question, and `ask`, which gives answers as they
come. To make one asks nothing, and needs neither key nor package. Questions and answers are plain dictionaries:
`{"text"}` -> `{"text", "cut", "input_tokens", "output_tokens"}`, for a reward model
`{"prompt", "completion", "finished"}` -> `{"score"}`. With `refused`, a sentence, an answer is none: the endpoint takes
no such request, for all that is asked, or for this text (too long, or filtered).

Keys come from the environment only. They are in no identity, and are taken out of every message.
"""

import hashlib
import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from urllib.parse import urlsplit

from rlhf_recipes.recipe.schema import Judge, Recipe, RecipeError, check_url
from rlhf_recipes.runs.references import is_hub_model, resolve_model
from rlhf_recipes.system.files import stamp_of
from rlhf_recipes.system.terminal import hush_libraries

Question = dict[str, Any]
Answer = dict[str, Any]

KEPT = "What was answered is kept: the same command goes on from there."

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
"""Seconds between tries, doubled each time: as in both client libraries."""


class Backend(Protocol):
    identity: dict[str, Any]
    labels: tuple[str, ...]
    """Answers that it can give; () for a reward model, which gives numbers."""

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        """Answers in any order, each as soon as it is there.

        Raises:
            RecipeError: No more answers are to be had; begins with the key to change.
        """


def backend_of(recipe: Recipe) -> Backend:
    """The backend that `judge.backend` names.

    Raises:
        RecipeError: No model is set, or an address in the environment cannot be used.
    """
    settings = recipe.judge
    if settings.model is None:
        what = (
            "a model reference" if settings.backend in ("local", "reward_model") else "the endpoint's name of a model"
        )
        raise RecipeError(f"judge.model: {settings.backend} needs one; set judge.model to {what}.")
    if settings.backend == "openai":
        return OpenAI(settings)
    if settings.backend == "anthropic":
        return Anthropic(settings)
    return Local(recipe) if settings.backend == "local" else RewardModel(recipe)


class RateLimit:
    """Lets callers in any thread through in even intervals.

    Args:
        per_minute: How many; None: all at once.
    """

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.interval = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock, self._next = threading.Lock(), -float("inf")

    def wait(self) -> None:
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self.interval
        if turn > now:
            self._sleep(turn - now)


class Unreadable(Exception):
    """An endpoint's answer is not what its protocol says: no JSON, or without what should be in it."""


class Endpoint:
    """A model behind HTTP, asked through its vendor's client library, which retries, waits and times out.

    Each try passes the rate limit. Answers that are not what the protocol says are asked again too, as often: proxies
    and servers that are starting give them.
    """

    library: str
    client_class: str
    key_variable: str
    url_variable: str
    vendor_url: str
    hint = "judge.parameters.temperature=null sends no temperature"
    """How to send less of what some models refuse."""
    labels = ("A", "B", "tie")

    def __init__(self, settings: Judge):
        self.settings = settings
        self.url = (settings.base_url or os.environ.get(self.url_variable) or self.vendor_url).rstrip("/")
        try:
            check_url(self.url)
        except ValueError as error:
            raise RecipeError(f"{self.url_variable}: {error}.") from None
        parts = urlsplit(self.url)
        self.where = parts.netloc + parts.path
        self.identity = {
            "backend": settings.backend,
            "where": self.where,
            "model": settings.model,
            "max_new_tokens": settings.max_new_tokens,
            "parameters": settings.parameters,
        }
        self._key = ""

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        self._key = self._read_key()
        client = self._client()
        try:
            yield from in_threads(lambda q: self._answer(client, q["text"]), questions, self.settings.workers)
        finally:
            client.close()

    def _request(self, client: Any, text: str) -> Any:
        """The raw response to one question."""
        raise NotImplementedError

    def _read(self, body: Any) -> Answer:
        """The answer in a response's JSON; LookupError or TypeError where it is not there."""
        raise NotImplementedError

    def _read_key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.url == self.vendor_url:
            raise RecipeError(
                f"judge.backend: {self.settings.backend} needs a key; set the environment's {self.key_variable}, or "
                "judge.base_url to an endpoint that needs none."
            )
        if not (key.isascii() and key.isprintable()):
            raise RecipeError(f"{self.key_variable} holds characters that no key has; set it anew.")
        return key

    def _client(self) -> Any:
        try:
            library = self._library = importlib.import_module(self.library)
        except ImportError as error:
            raise RecipeError(
                f"judge.backend: {self.settings.backend} needs the package {self.library}: "
                "pip install 'rlhf-recipes[judge]'"
            ) from error
        limit = RateLimit(self.settings.requests_per_minute)
        try:
            http_client = library.DefaultHttpxClient(event_hooks={"request": [lambda request: limit.wait()]})
        except Exception as error:  # noqa: BLE001 - what is wrong with the environment has many types
            # Its message, and with `from error` the traceback, may hold a proxy's password; of a package it names which.
            why = f"{type(error).__name__}: {error}" if isinstance(error, ImportError) else type(error).__name__
            raise RecipeError(
                f"judge.backend: {self.settings.backend} cannot make connections ({why}); correct the environment's "
                "proxy (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) or certificates (SSL_CERT_FILE, SSL_CERT_DIR)."
            ) from None
        return getattr(library, self.client_class)(
            api_key=self._key or "none",  # both libraries want one, whatever the endpoint
            base_url=self.url,
            timeout=self.settings.timeout,
            max_retries=self.settings.max_retries,
            http_client=http_client,
        )

    def _answer(self, client: Any, text: str) -> Answer:
        retries = self.settings.max_retries
        for left in reversed(range(retries + 1)):
            try:
                return self._try(client, text)
            except Unreadable as error:
                if left == 0:
                    raise RecipeError(
                        f"judge.base_url: {self.where} answers, with judge.max_retries={retries}, but not as its "
                        f"protocol says ({error}); is it an endpoint for judge.backend={self.settings.backend}? {KEPT}"
                    ) from None
                time.sleep(min(FIRST_PAUSE * 2 ** (retries - left), LONGEST_PAUSE))
        raise AssertionError("the last try returns or raises")

    def _try(self, client: Any, text: str) -> Answer:
        library, retries = self._library, self.settings.max_retries
        # `from None`: a chained traceback would show what is taken out here.
        try:
            response = self._request(client, text)
        except library.APITimeoutError:
            raise RecipeError(
                f"judge.timeout: {self.where} gave no answer within {self.settings.timeout:g} s, with "
                f"judge.max_retries={retries}; is it there, and is it this slow? {KEPT}"
            ) from None
        except library.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RecipeError(
                f"judge.base_url: {self.where} cannot be reached, with judge.max_retries={retries}: "
                f"{type(cause).__name__}: {self._without_key(cause)}. {KEPT}"
            ) from None
        except library.APIStatusError as error:
            said = self._refused(error)
            if error.status_code in (400, 413, 422):
                return {"text": "", "cut": False, "input_tokens": 0, "output_tokens": 0, "refused": said}
            raise RecipeError(said) from None
        try:
            body = response.http_response.json()
        except (ValueError, RecursionError):
            raise Unreadable(f"no JSON: {self._without_key(response.http_response.text, 80)!r}") from None
        try:
            answer = self._read(body)
        except (LookupError, TypeError, AttributeError):
            raise Unreadable(f"no completion in it: {self._without_key(json.dumps(body), 80)}") from None
        return answer | {"text": self._without_key(answer["text"], None)}

    def _refused(self, error: Any) -> str:
        """Explains an endpoint's status to the user."""
        status = error.status_code
        if status in (401, 403):
            # What it says of a key may hold parts of it.
            state = "refuses the key in" if self._key else "wants a key, and there is none in"
            return f"judge.backend: {self.where} {state} {self.key_variable} ({status}); set a valid one there."
        said = self._without_key(_message(error))
        if status == 404:
            return (
                f"judge.model: {self.where} does not know the model {self.settings.model}, or there is no such "
                f"endpoint ({status}: {said}); set judge.model or judge.base_url."
            )
        if status in (408, 409, 429) or status >= 500:
            return (
                f"judge.max_retries: {self.where} answers {status} ({said}), with judge.max_retries="
                f"{self.settings.max_retries}; wait, or set judge.requests_per_minute or judge.workers lower. {KEPT}"
            )
        return (
            f"judge: {self.where} refuses the request ({status}: {said}); change judge.model, judge.parameters or "
            f"judge.max_new_tokens ({self.hint})."
        )

    def _without_key(self, said: Any, longest: int | None = 300) -> str:
        """An endpoint's message in one line, without the key, which it may have sent back."""
        text = " ".join(str(said).split())
        # Servers of one's own are given words such as `none`, which are no secrets.
        return (text.replace(self._key, "[key]") if len(self._key) >= 8 else text)[:longest]


class OpenAI(Endpoint):
    library, client_class, key_variable = "openai", "OpenAI", "OPENAI_API_KEY"
    url_variable, vendor_url = "OPENAI_BASE_URL", "https://api.openai.com/v1"
    hint = f"{Endpoint.hint}, judge.parameters.max_completion_tokens=16 sends that instead of max_tokens"

    def _request(self, client: Any, text: str) -> Any:
        parameters = self.settings.parameters
        # The vendor's newer models refuse max_tokens, and some other servers know nothing else.
        names = "max_completion_tokens", "max_tokens"
        if not any(name in parameters for name in names):
            parameters = {names[0 if self.url == self.vendor_url else 1]: self.settings.max_new_tokens} | parameters
        return client.chat.completions.with_raw_response.create(
            model=self.settings.model, messages=[{"role": "user", "content": text}], extra_body=parameters
        )

    def _read(self, body: Any) -> Answer:
        choice, usage = body["choices"][0], body.get("usage") or {}
        return {
            "text": _text(choice["message"].get("content")),
            "cut": choice.get("finish_reason") == "length",
            "input_tokens": _count(usage.get("prompt_tokens")),
            "output_tokens": _count(usage.get("completion_tokens")),
        }


class Anthropic(Endpoint):
    library, client_class, key_variable = "anthropic", "Anthropic", "ANTHROPIC_API_KEY"
    url_variable, vendor_url = "ANTHROPIC_BASE_URL", "https://api.anthropic.com"

    def _request(self, client: Any, text: str) -> Any:
        return client.messages.with_raw_response.create(
            model=self.settings.model,
            max_tokens=self.settings.max_new_tokens,
            messages=[{"role": "user", "content": text}],
            extra_body=self.settings.parameters,
        )

    def _read(self, body: Any) -> Answer:
        usage = body.get("usage") or {}
        return {
            "text": _text(body["content"]),
            "cut": body["stop_reason"] == "max_tokens",
            "input_tokens": _count(usage.get("input_tokens")),
            "output_tokens": _count(usage.get("output_tokens")),
        }


class OnThisMachine:
    """A model that is loaded here, known by its weights: its name may stand for others tomorrow."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.settings = recipe, recipe.judge
        self.identity = {
            "backend": self.settings.backend,
            "model": self.settings.model,
            "weights": _weights(recipe, self.settings.model),
        }


class Local(OnThisMachine):
    """A causal language model, of which only the next token is read: A or B, whichever is likelier.

    Small and base models seldom answer in the form that they are asked for; which of two answers they lean to they
    always tell. `tie` is not put to them: a model that cannot decide answers by position, and is inconsistent. Only
    where both labels are equally likely, which the coarse numbers of bfloat16 can make them, the answer is a tie.
    """

    labels = ("A", "B")

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        import torch
        from accelerate import PartialState
        from transformers import AutoModelForCausalLM

        from rlhf_recipes.data.tokenizer import context_length, load_tokenizer
        from rlhf_recipes.models.forward import completion_logits, pad_batch
        from rlhf_recipes.models.load import load_model

        hush_libraries()
        name, size = self.settings.model, self.settings.batch_size
        folder, trusted = resolve_model(self.recipe, "judge.model", name), name in self.recipe.trust_remote_code
        tokenizer = load_tokenizer(self.recipe, "judge.model", name)
        prefix, tokens = _label_tokens(tokenizer, name)
        rows = sorted(((_prompt_ids(tokenizer, q["text"]) + prefix, q) for q in questions), key=lambda row: len(row[0]))
        model = load_model(AutoModelForCausalLM, "judge.model", folder, trusted, dtype="auto")
        model = model.to(PartialState().device).eval()
        context, longest = context_length(model.config, tokenizer), len(rows[-1][0])
        if longest > context:
            raise RecipeError(
                f"judge.model: {name} reads {context} tokens at most, and the longest question has {longest}; take "
                "another model, or shorten judge.criterion."
            )
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            ids, mask, _ = pad_batch([row for row, _ in batch], [tokens[:1]] * len(batch), tokenizer.pad_token_id)
            with torch.inference_mode():
                logits, _ = completion_logits(model, ids.to(model.device), mask.to(model.device), 1)
            for (_, question), (a, b) in zip(batch, logits[:, 0, tokens].tolist(), strict=True):
                yield question, {"text": "tie" if a == b else "A" if a > b else "B", "cut": False}


class RewardModel(OnThisMachine):
    """A reward model: it scores every completion alone, as it was trained to, so there is no order to swap."""

    labels = ()

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        from rlhf_recipes.rewards.calls import call_all, checked
        from rlhf_recipes.rewards.functions import reward_model

        hush_libraries()
        name, size = self.settings.model, self.settings.batch_size
        function = reward_model(
            resolve_model(self.recipe, "judge.model", name),
            batch_size=size,
            trust_remote_code=name in self.recipe.trust_remote_code,
        )
        function = checked(function, "judge", may_skip=False)
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            (scores,) = call_all(
                [function],
                prompts=[question["prompt"] for question in batch],
                completions=[question["completion"] for question in batch],
                completion_ids=[[] for _ in batch],  # the policy's, which a reward model does not read
                finished=[question["finished"] for question in batch],
            )
            yield from zip(batch, ({"score": score} for score in scores), strict=True)


def in_threads(work: Callable[[Any], Any], items: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Pairs of an item and what `work` made of it, as they are done; the first error ends it.

    Daemon threads: neither an error nor Ctrl-C waits for the requests that are under way, which may be in a long pause.
    """
    waiting: SimpleQueue = SimpleQueue()
    done: SimpleQueue = SimpleQueue()
    items = list(items)
    for item in items:
        waiting.put(item)
    stopped = threading.Event()

    def worker() -> None:
        while not stopped.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((item, work(item), None))
            except BaseException as error:  # noqa: BLE001 - the caller that waits raises it
                stopped.set()  # here: what would fail as well is not asked any more
                done.put((item, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=worker, name="judge", daemon=True).start()
    try:
        for _ in items:
            item, result, error = done.get()
            if error is not None:
                raise error
            yield item, result
    finally:
        stopped.set()


def _text(content: Any) -> str:
    """An answer's text, also where it comes in parts, of which those of thoughts are left out; TypeError for no text."""
    if content is None:  # a refusal
        return ""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise TypeError("no text")
    return content


def _count(tokens: Any) -> int | None:
    """A number of tokens, where the endpoint says one."""
    return tokens if isinstance(tokens, int) else None


def _message(error: Any) -> str:
    """The message that an endpoint sends with a status: from anywhere in its JSON, or the whole text."""
    body = error.body
    while isinstance(body, dict) and isinstance(body.get("error"), (dict, str)):
        body = body["error"]
    if isinstance(body, dict) and body.get("message"):
        return str(body["message"])
    return str(body) if body else error.message


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    from rlhf_recipes.data.tokenizer import token_ids

    if tokenizer.chat_template:
        return token_ids(tokenizer, [{"role": "user", "content": text}])
    ids = token_ids(tokenizer, f"{text}\n\nAnswer:")
    # Some tokenizers put EOS behind every text; nothing is said after it.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _label_tokens(tokenizer: Any, name: str) -> tuple[list[int], list[int]]:
    """Tokens that both answers begin with, and the first that tells A from B, as they stand behind a question."""
    from rlhf_recipes.data.tokenizer import token_ids

    before: list[int] = []
    if tokenizer.chat_template:
        # Its own answers show what stands before them: nothing, a blank, or the marks of no thoughts.
        chat = [{"role": "user", "content": "A or B?"}]
        before = token_ids(tokenizer, chat)
        answered = ([*chat, {"role": "assistant", "content": label}] for label in Local.labels)
        a, b = (tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"] for messages in answered)
    else:
        a, b = (tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in Local.labels)
    same = next((i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
    if same is None or tokenizer.unk_token_id in (a[same], b[same]):
        raise RecipeError(f"judge.model: {name} has no tokens for A and B, so it cannot answer; take another model.")
    prefix = a[len(before) : same] if a[: len(before)] == before else []
    return prefix, [a[same], b[same]]


def _weights(recipe: Recipe, reference: str) -> str | None:
    """Tells a folder's weights from earlier ones in the same place; None for a model of the Hub, known by its name.

    Names, sizes and times of files: to read a large model's weights for a hash would take longer than to ask it.
    """
    if is_hub_model(reference):
        return None
    from rlhf_recipes.models.load import adapter_of, base_of

    folder = resolve_model(recipe, "judge.model", reference)
    adapter = adapter_of("judge.model", folder)
    folders = [folder] if adapter is None else [folder, base_of("judge.model", folder, adapter)]
    files = [
        stamp_of(path)
        for folder in folders
        for path in sorted(Path(folder).iterdir())
        if path.is_file() and path.suffix in (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
        if path.name != "manifest.json"
    ]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()

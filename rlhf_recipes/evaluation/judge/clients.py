"""Judges behind HTTP: OpenAI's chat completions and Anthropic's messages.

The vendors' client libraries retry, pause between tries and time out. Keys come from the environment only: no identity
holds one, and every message and answer is cleaned of them.
"""

import importlib
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from rlhf_recipes.evaluation.judge.parse import Answer, Question
from rlhf_recipes.evaluation.judge.threads import RateLimit, in_threads
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.stages import Judge, check_url

KEPT = "The answers so far are kept: the same command continues from there."

REFUSED_REQUEST = (400, 413, 422)
"""Statuses that may concern one text only: it is too long, or filtered."""


class Endpoint:
    """A model behind HTTP. Every try passes the rate limit; an answer that cannot be read is asked for again."""

    package: str
    client_class: str
    key_variable: str
    url_variable: str
    vendor_url: str
    hint = "judge.parameters.temperature=null sends no temperature"
    """How to leave out what some models refuse."""
    labels: tuple[str, ...] = ("A", "B", "tie")

    def __init__(self, settings: Judge):
        self.settings = settings
        self.url = (settings.base_url or os.environ.get(self.url_variable) or self.vendor_url).rstrip("/")
        try:
            check_url(self.url)
        except ValueError as error:
            raise RecipeError(f"{self.url_variable}: {error}.") from None
        parts = urlsplit(self.url)
        self.where = parts.netloc + parts.path
        depends_on = settings.model_dump(include={"backend", "model", "max_new_tokens", "parameters"})
        self.identity = {"where": self.where} | depends_on
        self._key = ""

    def ask(self, questions: list[Question]) -> Iterator[tuple[Question, Answer]]:
        self._key = self._read_key()
        try:
            library = importlib.import_module(self.package)
        except ImportError as error:
            raise RecipeError(
                f"judge.backend: {self.settings.backend} needs the package {self.package}: "
                "pip install 'rlhf-recipes[judge]'"
            ) from error
        # Never closed: requests under way when this ends early would fail, and be tried again.
        client = self._client(library)
        return in_threads(lambda q: self._answer(library, client, q["text"]), questions, self.settings.workers)

    def _request(self, client: Any, text: str) -> Any:
        """The raw response to one question."""
        raise NotImplementedError

    def _read(self, body: Any) -> Answer:
        """The answer in a response's JSON; LookupError, TypeError or AttributeError where it is not there."""
        raise NotImplementedError

    def _read_key(self) -> str:
        key = os.environ.get(self.key_variable, "").strip()
        if not key and self.url == self.vendor_url:
            raise RecipeError(
                f"judge.backend: {self.settings.backend} needs a key; set the environment's {self.key_variable}, or "
                "judge.base_url to an endpoint that needs none."
            )
        if not (key.isascii() and key.isprintable()):
            raise RecipeError(f"{self.key_variable} holds characters that no key has; set it again.")
        return key

    def _client(self, library: Any) -> Any:
        limit = RateLimit(self.settings.requests_per_minute)
        hooks = {"request": [lambda request: limit.wait()], "response": [self._fail_unreadable]}
        try:
            http_client = library.DefaultHttpxClient(event_hooks=hooks)
        except Exception as error:  # noqa: BLE001 - a wrong environment raises many types
            # The message and the traceback may hold a proxy's password; an ImportError only names a package.
            why = f"{type(error).__name__}: {error}" if isinstance(error, ImportError) else type(error).__name__
            raise RecipeError(
                f"judge.backend: {self.settings.backend} cannot make connections ({why}); correct the environment's "
                "proxy (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) or certificates (SSL_CERT_FILE, SSL_CERT_DIR)."
            ) from None
        return getattr(library, self.client_class)(
            api_key=self._key or "none",  # both libraries require one, whatever the endpoint
            base_url=self.url,
            timeout=self.settings.timeout,
            max_retries=self.settings.max_retries,
            http_client=http_client,
        )

    def _fail_unreadable(self, response: Any) -> None:
        """Turns an answer that breaks the protocol into the status 502, which the libraries retry.

        Proxies, and servers that are starting, give such answers.
        """
        response.read()
        if response.is_success:
            try:
                self._read(response.json())
            except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
                response.status_code, response.extensions["unreadable"] = 502, True

    def _answer(self, library: Any, client: Any, text: str) -> Answer:
        tries = f"with judge.max_retries={self.settings.max_retries}"
        # `from None`: a chained traceback would show the key that the message leaves out.
        try:
            answer = self._read(self._request(client, text).http_response.json())
        except library.APITimeoutError:
            raise RecipeError(
                f"judge.timeout: {self.where} gave no answer within {self.settings.timeout:g} s, {tries}; is it there, "
                f"and is it this slow? {KEPT}"
            ) from None
        except library.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RecipeError(
                f"judge.base_url: {self.where} cannot be reached, {tries}: {type(cause).__name__}: "
                f"{self._without_key(cause)}. {KEPT}"
            ) from None
        except library.APIStatusError as error:
            said = self._explain(error, tries)
            if error.status_code in REFUSED_REQUEST:
                return {"text": "", "cut": False, "input_tokens": 0, "output_tokens": 0, "refused": said}
            raise RecipeError(said) from None
        return answer | {"text": self._without_key(answer["text"], None)}

    def _explain(self, error: Any, tries: str) -> str:
        """Explains an endpoint's error status to the user."""
        status = error.status_code
        if error.response.extensions.get("unreadable"):
            return (
                f"judge.base_url: {self.where} answers, {tries}, but not as its protocol says "
                f"({self._without_key(error.response.text, 80)!r}); is it an endpoint for "
                f"judge.backend={self.settings.backend}? {KEPT}"
            )
        if status in (401, 403):
            # The endpoint's own message may hold parts of the key.
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
                f"judge.max_retries: {self.where} answers {status} ({said}), {tries}; wait, or set "
                f"judge.requests_per_minute or judge.workers lower. {KEPT}"
            )
        return (
            f"judge: {self.where} refuses the request ({status}: {said}); change judge.model, judge.parameters or "
            f"judge.max_new_tokens ({self.hint})."
        )

    def _without_key(self, said: Any, most: int | None = 300) -> str:
        """At most so many characters of an endpoint's text, in one line and without the key, which it may repeat."""
        text = " ".join(str(said).split())
        # A user's own server gets words such as `none` as its key, which are no secrets.
        return (text.replace(self._key, "[key]") if len(self._key) >= 8 else text)[:most]


class OpenAI(Endpoint):
    package, client_class, key_variable = "openai", "OpenAI", "OPENAI_API_KEY"
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
    package, client_class, key_variable = "anthropic", "Anthropic", "ANTHROPIC_API_KEY"
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


def _text(content: Any) -> str:
    """An answer's text; of an answer in parts, the text parts without thoughts. TypeError for anything else."""
    if content is None:  # a refusal
        return ""
    if isinstance(content, list):
        return "".join(_text(part.get("text")) for part in content if part["type"] == "text")
    if not isinstance(content, str):
        raise TypeError("no text")
    return content


def _count(tokens: Any) -> int | None:
    """A number of tokens; None where the endpoint does not say one."""
    return tokens if isinstance(tokens, int) else None


def _message(error: Any) -> str:
    """The message an endpoint sends with a status, from anywhere in its JSON; the whole text where there is none."""
    body = error.body
    while isinstance(body, dict) and isinstance(body.get("error"), (dict, str)):
        body = body["error"]
    if isinstance(body, dict) and body.get("message"):
        return str(body["message"])
    return str(body) if body else error.message

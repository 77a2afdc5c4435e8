"""Secrets in settings: tokens, keys and passwords reach no file, no tracker and no message (`docs/security.md`)."""

import os
import re
from collections.abc import Iterator
from typing import Any

_SECRET = re.compile(
    r"(^|_)(token|(api|access|private|secret|auth)_?keys?|secrets?|passw(or)?ds?|passphrase|credentials?|authorization|cookie)$"
)
_OF_TEXT = re.compile(r"(pad|eos|bos|unk|sep|cls|mask|image|audio|video|start|end|stop|special|prefix|suffix)_token$")
"""Tokens of a tokenizer, which are no secrets."""

_IN_TEXT = (
    (re.compile(r"(?i)(?<=://)[^/\s@'\"]*:[^/\s@'\"]*@|(?<=https://)[^/\s@'\"]+@|(?<=http://)[^/\s@'\"]+@"), ""),
    (re.compile(r"(?i)((?:--|[?&])[\w-]*(?:token|key|secret|password)=)[^\s&'\"]+"), r"\1<redacted>"),
    (re.compile(r"\b(hf_|sk-|gh[opsu]_|github_pat_|xox[abp]-|AKIA)[\w-]{16,}"), "<redacted>"),
)

HANDED_ON = "RLHF_RECIPES_SECRETS"
"""Environment variable with `secrets_in` a recipe, for a process that reads a copy of it without them."""

LONG = 6
"""Characters of a secret that is also replaced inside of other texts."""

_known: set[str] = set()


def is_secret(key: Any, value: Any) -> bool:
    """Whether a key holds a secret by its name, such as `hub_token`; a switch and a token of a text are none."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|-", "_", str(key)).lower()
    if value is None or isinstance(value, bool) or not _SECRET.search(name) or _OF_TEXT.search(name):
        return False
    if not name.endswith("token") or isinstance(value, (list, dict)):
        return True
    return isinstance(value, str) and re.fullmatch(r"[^\s<\[]\S{3,}", value) is not None


def learn(values: Any) -> None:
    """Remember the secrets of settings and of the environment, for `redacted`."""
    found = secrets_in(values) | {name: value for name, value in os.environ.items() if is_secret(name, value)}
    for value in found.values():
        for text in _texts(value):
            passwords = re.findall(r"://[^/\s:@]*:([^/\s@]+)@", text)
            _known.update(secret for secret in passwords or [text] if len(secret) >= LONG)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, (str, int)):
        yield str(value)


def secrets_in(values: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value of every secret in settings, and of every text with one inside."""
    if isinstance(values, (dict, list)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        found: dict[str, Any] = {}
        for key, value in items:
            secret = isinstance(values, dict) and is_secret(key, value)
            found |= {f"{path}{key}": value} if secret else secrets_in(value, f"{path}{key}.")
        return found
    return {path[:-1]: values} if isinstance(values, str) and redacted(values) != values else {}


def without_known(text: str) -> str:
    """A text without the secrets that `learn` has seen."""
    for secret in _known:
        text = text.replace(secret, "<redacted>")
    return text


def redacted(value: Any) -> Any:
    """A copy of nested lists and dictionaries without the keys of secrets, and without known secrets inside of texts."""
    if isinstance(value, dict):
        return {key: redacted(inner) for key, inner in value.items() if not is_secret(key, inner)}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(map(redacted, value))
    if not isinstance(value, str):
        return value
    value = without_known(value)
    for pattern, instead in _IN_TEXT:
        value = pattern.sub(instead, value)
    return value


def drop_secrets(settings: Any) -> None:
    """Take the secrets out of an object's attributes, such as a trainer's arguments, which are saved and sent to trackers."""
    for name, value in list(vars(settings).items()):
        if isinstance(value, (str, dict, list)) and redacted({name: value}) != {name: value}:
            setattr(settings, name, None if is_secret(name, value) else redacted(value))

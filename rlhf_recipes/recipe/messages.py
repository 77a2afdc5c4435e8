"""Chat messages as plain text."""


def as_text(message: str | list[dict]) -> str:
    """A prompt or completion as plain text: for chat messages the contents, one per line; a tool call has no content."""
    return message if isinstance(message, str) else "\n".join(part["content"] or "" for part in message)


def with_roles(message: str | list[dict], between: str = "\n") -> str:
    """A prompt or completion as plain text; each chat message begins with its role, and `between` separates them."""
    if isinstance(message, str):
        return message
    return between.join(
        f"{part['role']}: {part.get('content') or ''}" for part in message
    )  # a tool call has no content

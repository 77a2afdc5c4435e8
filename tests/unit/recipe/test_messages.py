"""Chat messages as plain text."""

from rlhf_recipes.recipe.messages import with_roles


def test_a_message_without_content_keeps_its_role():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": []}]
    assert with_roles(messages) == "user: a\nassistant: "

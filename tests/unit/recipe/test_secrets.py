"""Secrets in settings are told apart from other values, are left out of copies, and are handed on to processes."""

import json

import pytest

from rlhf_recipes.recipe import secrets
from rlhf_recipes.recipe.load import load_recipe, to_yaml
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.recipe.secrets import drop_secrets, is_secret, learn, redacted, secrets_in
from rlhf_recipes.system.terminal import complain


@pytest.fixture(autouse=True)
def none_known(monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())


SECRET = (
    "hub_token token HF_TOKEN x-token service_token apiKey api_key OPENAI_API_KEY AWS_SECRET_ACCESS_KEY password passwd"
)
PLAIN = "pad_token eos_token stop_token max_tokens num_tokens tokens keyboard key special_tokens tokenizer secretary passwords_file"


def test_a_key_tells_a_secret_by_its_name():
    assert [key for key in SECRET.split() if not is_secret(key, "s3cret-value")] == []
    assert [key for key in PLAIN.split() if is_secret(key, "s3cret-value")] == []
    for value in (True, None, "<|endoftext|>", "[PAD]", ".", "two words"):  # a switch, and tokens of texts
        assert not is_secret("model_token", value)
    assert is_secret("password", 123456) and is_secret("credentials", {"user": "me"})


def test_a_copy_has_no_secrets_and_all_else():
    values = {
        "token": "s3cret-value",
        "url": "https://me:p4ssword@host/x?api_key=abc&page=2",
        "deep": [{"apiKey": "s3cret-other", "weight": 1.0}, ("--x-token=abc", "hf_" + "a" * 30)],
        "text": "the eos_token of org/model@main is <eos>; write to me@example.org",
    }
    learn(values)
    assert redacted(values) == {
        "url": "https://host/x?api_key=<redacted>&page=2",
        "deep": [{"weight": 1.0}, ("--x-token=<redacted>", "<redacted>")],
        "text": values["text"],
    }
    assert redacted("said s3cret-other, p4ssword") == "said <redacted>, <redacted>"
    assert set(secrets_in(values)) == {"token", "url", "deep.0.apiKey"}


def test_sealed_arguments_have_no_secrets():
    class Arguments:
        hub_token = None

    args = Arguments()
    vars(args).update(
        hub_token="s3cret-value", model_init_kwargs={"token": "s3cret-other", "dtype": "float32"}, pad_token="<pad>"
    )
    drop_secrets(args)
    assert vars(args) == {"hub_token": None, "model_init_kwargs": {"dtype": "float32"}, "pad_token": "<pad>"}


def test_a_process_of_a_sweep_gets_the_secrets_that_its_copy_of_the_recipe_lacks(tmp_path, monkeypatch):
    recipe = load_recipe(
        "imdb_tiny",
        [
            "ppo.trainer.hub_token=s3cret-value",
            "reward_funcs=[{name: length}, {name: 'own.py:f', args: {password: \"p: '1\\n\", url: 'http://a:b@c'}}]",
        ],
    )
    (tmp_path / "copy.yaml").write_text(to_yaml(recipe))
    copy = load_recipe(str(tmp_path / "copy.yaml"))
    assert copy != recipe and copy.reward_funcs[1].args == {"url": "http://c"}
    monkeypatch.setenv(secrets.HANDED_ON, json.dumps(secrets_in(recipe.model_dump(exclude_none=True))))
    assert load_recipe(str(tmp_path / "copy.yaml")) == recipe


def test_messages_have_no_secrets(capsys):
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            "imdb_tiny", ["ppo.trainer.learning_rate={password: s3cret-value}", "rloo.trainer.hub_token=[s3cret-other]"]
        )
    complain(str(caught.value))
    said = capsys.readouterr().err
    assert "ppo.trainer.learning_rate" in said and "s3cret" not in said

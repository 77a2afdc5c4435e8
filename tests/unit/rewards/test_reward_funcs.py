"""Every reward function by hand, the reading of reward models, and users' mistakes."""

import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from rlhf_recipes.cli import app
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.sections import Data, RewardFunc
from rlhf_recipes.rewards import functions
from rlhf_recipes.rewards.calls import score_all
from rlhf_recipes.rewards.checked import RewardError
from rlhf_recipes.rewards.registry import REWARD_FUNCS, build_reward_funcs, check_functions
from rlhf_recipes.rewards.score import apply_missing_eos, shape_scores
from support.tiny_models import causal_lm, save_pair, word_tokenizer


def recipe(*specs: dict) -> Recipe:
    return Recipe(
        name="t", description="t", data=Data(path="x.jsonl"), reward_funcs=[RewardFunc(**spec) for spec in specs]
    )


def call(
    prompts=("the film", "it"),
    completions=(" was good .", " was bad"),
    ids=((5, 6, 1), (5, 5, 5, 5)),
    finished=(True, False),
):
    return {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": [list(i) for i in ids],
        "finished": list(finished),
    }


def values(spec: dict, **arguments) -> list:
    made = recipe(spec)
    return build_reward_funcs(made, made.reward_funcs)[0](**(arguments or call()))


def test_length_and_range():
    assert values({"name": "length"}) == [-3, -2]
    assert values({"name": "length", "args": {"unit": "tokens"}}) == [-2, -4]  # EOS is not counted
    assert values({"name": "length_range", "args": {"minimum": 3}}) == [0, -1]
    assert values({"name": "length_range", "args": {"maximum": 2, "unit": "tokens"}}) == [0, -1]


def test_repetition_and_regex():
    assert values({"name": "repetition"}) == [0, 0.75]
    assert values({"name": "repetition", "args": {"unit": "words"}}) == [0, 0]
    assert values({"name": "regex", "args": {"pattern": r"\bgood\b", "no_match": -1.0}}) == [1, -1]


def test_a_pattern_that_backtracks_is_an_error(monkeypatch):
    """Python's `re` would hold the interpreter for years, and with it SIGTERM."""
    monkeypatch.setattr(functions, "SEARCH_SECONDS", 0.05)
    with pytest.raises(RewardError, match=r"regex: '\(a\|a\)\*\$' took more than 0.05 s on 'aaa"):
        values({"name": "regex", "args": {"pattern": "(a|a)*$"}}, **call(completions=["a" * 60 + "b", "a"]))


def test_vader():
    good, bad = values({"name": "vader_sentiment"})
    assert good > 0.3 and bad < -0.3


def test_sentiment_reads_the_named_label_of_any_classifier(classifier_folder):
    args = {"model": str(classifier_folder)}
    positive, negative, second = (
        values({"name": "sentiment", "args": args | {"label": label}}) for label in ("POSITIVE", "negative", 1)
    )
    assert positive == second and positive != negative
    shares = [
        values({"name": "sentiment", "args": args | {"label": label, "output": "probability"}}) for label in (0, 1)
    ]
    assert [a + b for a, b in zip(*shares, strict=True)] == pytest.approx([1, 1], abs=1e-5)
    with pytest.raises(RecipeError, match="'HAPPY'.*NEGATIVE, POSITIVE"):
        values({"name": "sentiment", "args": args | {"label": "HAPPY"}})


def test_sentiment_of_a_text_does_not_depend_on_its_batch(classifier_folder):
    spec = {"name": "sentiment", "args": {"model": str(classifier_folder), "batch_size": 2}}
    many = call(
        prompts=["the film"] * 3,
        completions=[" was good", " was " + "very " * 20, " bad"],
        ids=[[1]] * 3,
        finished=[True] * 3,
    )
    alone = call(prompts=["the film"], completions=[" bad"], ids=[[1]], finished=[True])
    assert values(spec, **many)[2] == pytest.approx(values(spec, **alone)[0], abs=1e-5)


@pytest.fixture(params=["pad", "pad == eos"])
def reward_model_folder(request, tmp_path):
    tokenizer = word_tokenizer()
    if request.param == "pad == eos":
        tokenizer.pad_token = tokenizer.eos_token
    save_pair(tmp_path / "lm", causal_lm(tokenizer), tokenizer)
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.config.pad_token_id = tokenizer.pad_token_id
    return save_pair(tmp_path / "rm", model, tokenizer)


def test_a_reward_model_is_read_where_it_was_trained_to_be_read(reward_model_folder):
    """At the EOS that TRL's RewardTrainer appends; a cut-off completion has none. Alone or in a batch."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    texts = call(prompts=["the film", "it"], completions=[" was good .", " was bad and very very awful"])
    found = values({"name": "reward_model", "args": {"model": str(reward_model_folder)}}, **texts)
    args = RewardConfig(
        output_dir="unused", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True
    )
    pair = Dataset.from_dict({"chosen": ["the film was good ."], "rejected": ["it was bad and very very awful"]})
    trainer = RewardTrainer(model=str(reward_model_folder), args=args, train_dataset=pair)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with torch.no_grad():
        as_trained = trainer.model.eval()(**batch).logits[:, 0].tolist()
    assert found[0] == pytest.approx(as_trained[0], abs=1e-5)
    tokenizer = trainer.processing_class
    cut_off = tokenizer("it was bad and very very awful", return_tensors="pt")
    with torch.no_grad():
        expected = trainer.model(input_ids=cut_off["input_ids"]).logits[0, 0].item()
    assert found[1] == pytest.approx(expected, abs=1e-5)
    if tokenizer.pad_token != tokenizer.eos_token:
        assert abs(found[1] - as_trained[1]) > 1e-3  # it is not scored as if it were finished


def test_a_stored_center_is_subtracted(reward_model_folder):
    spec = {"name": "reward_model", "args": {"model": str(reward_model_folder)}}
    before = values(spec)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model_folder)
    model.config.score_center = 0.25
    model.save_pretrained(reward_model_folder)
    assert values(spec) == pytest.approx([value - 0.25 for value in before], abs=1e-6)


@pytest.mark.parametrize("name", ["sentiment", "reward_model"])
def test_a_scoring_model_in_half_precision_scores_nearly_the_same(name, reward_model_folder, tmp_path):
    args = {"model": str(reward_model_folder)} | ({"label": 0} if name == "sentiment" else {})
    exact = values({"name": name, "args": args})
    for dtype in ("bfloat16", "float16"):
        scores = values({"name": name, "args": args | {"dtype": dtype}})
        assert scores == pytest.approx(exact, rel=0.03, abs=0.03) and scores != exact
    half = AutoModelForSequenceClassification.from_pretrained(reward_model_folder, dtype=torch.bfloat16)
    save_pair(tmp_path / "half", half, AutoTokenizer.from_pretrained(reward_model_folder))
    as_saved = values({"name": name, "args": args | {"model": str(tmp_path / "half"), "dtype": "auto"}})
    assert as_saved == values({"name": name, "args": args | {"dtype": "bfloat16"}})


def test_a_classifier_with_two_labels_is_no_reward_model(classifier_folder):
    with pytest.raises(RecipeError, match="2 labels"):
        values({"name": "reward_model", "args": {"model": str(classifier_folder)}})


@pytest.mark.parametrize("key", ["reward_funcs", "eval.held_out_funcs"])
def test_an_error_about_a_model_names_its_key(key, classifier_folder):
    model = {"model": str(classifier_folder)}
    for spec, expected in (
        ({"name": "sentiment", "args": model | {"label": 2}}, "1.args.label: .* has no label 2; it has: NEGATIVE, POS"),
        ({"name": "reward_model", "args": model}, "1.name: reward_model: .* has 2 labels"),
        ({"name": "sentiment", "args": {"model": "no/model"}}, "1.args.model: no/model cannot be used"),
        ({"name": "regex", "args": {"pattern": "("}}, "1: regex: '\\(' is no regular expression"),
    ):
        made = recipe({"name": "length"}, spec)
        with pytest.raises(RecipeError, match=f"^{re.escape(key)}.{expected}"):
            build_reward_funcs(made, made.reward_funcs, key)


def test_chat_messages_are_scored_by_their_contents():
    chat = call(
        prompts=[[{"role": "user", "content": "a b"}]],
        completions=[[{"role": "assistant", "content": "c d e"}]],
        ids=[[1]],
        finished=[True],
    )
    assert values({"name": "length"}, **chat) == [-3]
    assert values({"name": "vader_sentiment"}, **chat) == [0]


OWN = """
import asyncio

def brevity(completions):  # no **kwargs: it gets what it asks for
    return [-len(c) for c in completions]

def factory(weight=2.0):
    return lambda completions, label, **kwargs: [weight * l for l in label]

async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [1.0] * len(completions)

def with_argument(completions, scale, **kwargs):
    return [scale] * len(completions)

def logs(completions, trainer_state, log_metric, log_extra):
    log_metric("done", trainer_state.global_step)
    log_extra("done", [1.0] * len(completions))
    return [trainer_state.global_step / trainer_state.max_steps] * len(completions)

def too_few(completions): return [0.0]
def nan(completions): return [0.0, float("nan")]
def none(completions): return [0.0, None]
def text(completions): return ["x", 1.0]
def nothing(completions): return None
def hangs(completions): import time; time.sleep(3600)
def raises(completions): raise KeyError("oops")
def one(prompts, completion): return 1.0
def both(completions, prompt): return [1.0] * len(completions)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # code below the current folder runs unasked
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path / 'own.py'}:"


def test_own_functions_and_factories_from_a_file(own):
    assert values({"name": own + "brevity"}) == [-11, -8]
    assert values({"name": own + "factory", "args": {"weight": 3.0}}, **call(), label=[1, 0]) == [3, 0]
    assert values({"name": own + "with_argument", "args": {"scale": 0.5}}) == [0.5, 0.5]


def test_own_functions_from_a_module(own):
    assert values({"name": "own:brevity"}) == [-11, -8]


def test_async_functions_and_weights(own):
    made = recipe({"name": own + "slow", "weight": 2.0}, {"name": "length", "weight": 0.5})
    scores, by_func = score_all(made.reward_funcs, build_reward_funcs(made, made.reward_funcs), 0, **call())
    assert scores == [0.5, 1.0] and by_func == {"slow": [1, 1], "length": [-3, -2]}


def test_a_recipe_sets_the_timeout_of_a_function(own):
    with pytest.raises(RewardError, match="'hangs' did not answer within 0.1 s"):
        values({"name": own + "hangs", "timeout": 0.1})
    for wrong in (0, -1.0, float("inf"), "5"):
        with pytest.raises(ValueError, match="timeout"):
            RewardFunc(name="length", timeout=wrong)


def test_an_argument_of_the_recipe_counts_more_than_a_column_of_that_name(own):
    assert values({"name": own + "with_argument", "args": {"scale": 0.5}}, **call(), scale=[7, 7]) == [0.5, 0.5]


def test_a_function_that_logs_or_reads_the_trainers_state_also_scores_outside_of_a_training(own):
    made = recipe({"name": own + "logs"})
    found, _ = score_all(made.reward_funcs, build_reward_funcs(made, made.reward_funcs), 0, **call())
    assert found == [1.0, 1.0]  # the state of a training at its end


def test_equal_functions_get_different_names(own):
    made = recipe({"name": "length"}, {"name": "length", "args": {"unit": "tokens"}})
    assert [f.__name__ for f in build_reward_funcs(made, made.reward_funcs)] == ["length", "length_2"]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("too_few", "'too_few' returned 1 values for 2"),
        ("nan", "'nan' returned nan for sample 1: ' was bad'"),
        ("text", "'text' returned 'x' for sample 0"),
        ("nothing", "'nothing' returned NoneType"),
        ("raises", "'raises' raised KeyError: 'oops'"),
    ],
)
def test_errors_of_functions_name_the_function_and_the_sample(own, function, expected):
    with pytest.raises(RewardError, match=re.escape(expected)):
        values({"name": own + function})


def test_none_means_does_not_apply_as_long_as_another_function_does(own):
    made = recipe({"name": own + "none"}, {"name": "length"})
    assert score_all(made.reward_funcs, build_reward_funcs(made, made.reward_funcs), 0, **call())[0] == [-3, -2]
    alone = recipe({"name": own + "none"})
    with pytest.raises(RewardError, match="'none' returned None for sample 1"):
        build_reward_funcs(alone, alone.reward_funcs)[0](**call())


def test_scores_by_hand():
    """A weighted sum of the functions that apply, then normalization, clipping and missing_eos, in this order."""
    nan = float("nan")
    values = torch.tensor([[1.0, 4.0], [2.0, nan], [nan, nan], [3.0, 2.0]])
    weights, finished = torch.tensor([1.0, 0.5]), torch.tensor([True, False, True, False])

    def scores(**more):
        return shape_scores(values, weights, finished, **more).nan_to_num(99.0).tolist()

    assert scores() == [3.0, 2.0, 99.0, 4.0]
    assert scores(missing_eos={"mode": "subtract", "value": 5.0}) == [3.0, -3.0, 99.0, -1.0]
    assert scores(missing_eos={"mode": "replace", "value": -1.0}, clip_range=(0.0, 2.5)) == [2.5, -1.0, 99.0, -1.0]
    assert scores(missing_eos={"mode": "subtract", "value": 5.0}, clip_range=(2.5, 3.5)) == [3.0, -2.5, 99.0, -1.5]
    all_of_it = {
        "missing_eos": {"mode": "replace", "value": -1.0},
        "normalize": lambda x: 10 * x,
        "clip_range": (0, 25),
    }
    assert scores(**all_of_it) == [25.0, -1.0, 99.0, -1.0]
    assert values[1, 1].isnan()  # the given values stay as they are


def test_missing_eos_by_hand():
    """Four completions: finished, cut off, cut off without a score, finished without a score."""
    nan = float("nan")
    finished = torch.tensor([True, False, False, True])
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([2.0, 3.0, nan, nan], dtype=dtype)
        replaced = apply_missing_eos(scores, finished, "replace", -1.0)
        subtracted = apply_missing_eos(scores, finished, "subtract", 0.5)
        torch.testing.assert_close(replaced, torch.tensor([2.0, -1.0, nan, nan], dtype=dtype), equal_nan=True)
        torch.testing.assert_close(subtracted, torch.tensor([2.0, 2.5, nan, nan], dtype=dtype), equal_nan=True)
        assert scores[1] == 3.0  # the given scores stay as they are
    with pytest.raises(ValueError, match="replace or subtract, not 'remove'"):
        apply_missing_eos(scores, finished, "remove", 1.0)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"name": "lenght"}, "nearest: length"),
        ({"name": "zzz"}, "known: sentiment"),
        ({"name": "length", "args": {"units": "words"}}, "nearest: unit"),
        ({"name": "length", "args": {"unit": "letters"}}, "one of words, tokens"),
        ({"name": "sentiment"}, "needs the argument 'model'"),
        ({"name": "regex"}, "needs the argument 'pattern'"),
        ({"name": "OWN:one"}, "own.py:one has the parameters prompts, completion; a reward function has `comp"),
        ({"name": "OWN:both"}, "own.py:both has the parameters prompt; a reward function has `completions`"),
        (
            {"name": "reward_model", "args": {"model": "nobody/has-it", "dtype": "bf16"}},
            "reward_model: dtype must be one of float32, bfloat16, float16, auto, not 'bf16'",
        ),
        ({"name": "OWN:missing"}, "brevity"),
        ({"name": "nowhere.py:f"}, "does not exist"),
        ({"name": "no_such_module:f"}, "cannot be imported"),
    ],
)
def test_names_and_arguments_are_checked_before_any_model_loads(own, spec, expected):
    spec = spec | {"name": spec["name"].replace("OWN:", own)}
    findings = check_functions(recipe(spec))
    assert len(findings) == 1 and expected in findings[0], findings


def test_rewards_command_lists_every_function_and_argument():
    printed = CliRunner().invoke(app, ["rewards"]).output
    for name in REWARD_FUNCS:
        assert f"\n{name}: " in "\n" + printed
    assert "label" in printed and "pattern" in printed


def test_a_reward_function_with_a_model_is_one_file_of_the_users(classifier_folder, tmp_path, monkeypatch):
    """The file is beside the recipe, which finds it from any folder. So does a child recipe in another folder."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.py").write_text(
        "from transformers import AutoModelForSequenceClassification\n"
        "def liking(model, scale=1.0):\n"
        "    labels = AutoModelForSequenceClassification.from_pretrained(model).config.num_labels\n"
        "    return lambda completions, **columns: [scale * labels] * len(completions)\n"
    )
    recipe_file = tmp_path / "project" / "mine.yaml"
    recipe_file.write_text(
        "extends: imdb_tiny\n"
        f"reward_funcs: [{{name: 'mine.py:liking', args: {{model: {classifier_folder}, scale: 0.5}}}}]\n"
    )
    (tmp_path / "child.yaml").write_text(f"extends: {recipe_file}\n")
    monkeypatch.chdir(tmp_path)
    for file in (recipe_file, tmp_path / "child.yaml"):
        made = load_recipe(str(file))
        assert check_functions(made) == [] and made.data.transform == "film_reviews.py:sentences"
        assert build_reward_funcs(made, made.reward_funcs)[0](**call()) == [1, 1]


def test_a_function_of_the_registry_is_one_entry_in_it(monkeypatch):
    def constant(value: float = 1.0):
        """The same for all."""
        return lambda completions, **columns: [value] * len(completions)

    monkeypatch.setitem(REWARD_FUNCS, "constant", constant)
    assert values({"name": "constant", "args": {"value": 2.0}}) == [2, 2]
    assert "nearest: value" in check_functions(recipe({"name": "constant", "args": {"valeu": 2.0}}))[0]
    assert "constant: The same for all." in CliRunner().invoke(app, ["rewards"]).output

"""Stage eval: what it measures is what a direct computation finds, for every model, however often it is stopped."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from statistics import fmean, pstdev

import pytest
import torch

from rlhf_recipes import evaluate
from rlhf_recipes.data.tokenizer import load_tokenizer
from rlhf_recipes.evaluation import evaluator
from rlhf_recipes.evaluation.metrics import perplexity, rouge
from rlhf_recipes.models import samples
from rlhf_recipes.models.likelihoods import sequence_logps, text_logps
from rlhf_recipes.models.samples import Samples
from rlhf_recipes.recipe.graph import eval_models, eval_reference
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs.files import PARTS, is_finished, read_manifest
from rlhf_recipes.runs.folder import Run
from rlhf_recipes.runs.inputs import check_references
from support.processes import run_python
from support.texts import REVIEWS, WORDS, write_jsonl
from support.tiny_models import bpe_tokenizer, causal_lm, save_pair, word_tokenizer

PROMPTS = ("the film", "it", "the plot and the acting", "a movie", "the acting", "i", "the plot was")
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}it {% endif %}"

REWARD = """
import os, random, time
calls = 0
def length(completions):
    return [float(len(text)) for text in completions]
def dice(completions):
    return [random.random() for text in completions]
def only_long(completions):
    return [float(len(text)) if len(text) > 20 else None for text in completions]
def breaks_at_second_model(completions):
    global calls
    calls += 1
    if calls == 2 and "HANG" in os.environ:
        time.sleep(600)
    if calls == 2 and "FAIL" in os.environ:
        raise RuntimeError("out of luck")
    return [random.random() for text in completions]
"""


@pytest.fixture
def other_folder(tmp_path):
    """Another random model over the same words."""
    tokenizer = word_tokenizer()
    return save_pair(tmp_path / "other", causal_lm(tokenizer, seed=7), tokenizer)


def recipe_of(tmp_path, models, *overrides, rows=None, rewards="[{name: length}]"):
    rows = rows or [{"prompt": prompt} for prompt in PROMPTS]
    (tmp_path / "data").mkdir(exist_ok=True)
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"data/{split}.jsonl", rows)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "r.yaml").write_text(
        f"name: r\ndescription: d\nruns_dir: {tmp_path}/runs\n"
        f"reward_funcs: {rewards.replace('mine.py', f'{tmp_path}/mine.py')}\n"
        f"data: {{path: {tmp_path}/data, eval_split: test}}\n"
        f"eval: {{max_new_tokens: 12, batch_size: 4, models: {json.dumps({k: str(v) for k, v in models.items()})}}}\n"
    )
    return load_recipe(str(tmp_path / "r.yaml"), list(overrides))


def run_eval(recipe):
    run = Run(recipe, "eval")
    run.start()
    try:
        evaluate.main(run)
    except RecipeError as error:
        run.fail(error)
        raise
    run.finish()
    return run


def read(run):
    lines = [json.loads(line) for line in (run.path / "completions.jsonl").read_text().splitlines()]
    return json.loads((run.path / "eval.json").read_text()), lines


@pytest.fixture
def sampled(monkeypatch):
    """Batches that are sampled, in order: (tokenizer, Samples)."""
    batches, plain = [], samples.sample

    def record(model, tokenizer, *arguments):
        found = plain(model, tokenizer, *arguments)
        batches.append((tokenizer, found))
        return found

    monkeypatch.setattr(samples, "sample", record)
    return batches


def of_model(sampled, index):
    """The samples of the nth model, in two batches each."""
    (_, first), (_, second) = sampled[2 * index : 2 * index + 2]
    return Samples(*(a + b for a, b in zip(vars(first).values(), vars(second).values(), strict=True)))


def directly(model, prompt_ids, completion_ids):
    """Log-probability of one completion, without padding, batch or cache."""
    with torch.no_grad():
        logps = model(torch.tensor([prompt_ids + completion_ids])).logits[0].float().log_softmax(-1)
    start = len(prompt_ids) - 1
    return sum(logps[start + i, token].item() for i, token in enumerate(completion_ids))


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# What is measured


def test_kl_and_perplexities_are_those_of_a_direct_computation(
    tmp_path, policy_folder, other_folder, bpe_policy_folder, sampled
):
    recipe = recipe_of(
        tmp_path, {"other": other_folder, "sft": policy_folder}, f"eval.perplexity_model={bpe_policy_folder}"
    )
    found, lines = read(run_eval(recipe))
    (sft, _), (other, _) = load(policy_folder), load(other_folder)
    bpe, bpe_tokens = load(bpe_policy_folder)
    assert found["reference"] == "sft" and list(found["models"]) == ["other", "sft"] and found["notes"] == []
    made = of_model(sampled, 0)
    own, under_sft = (
        [directly(m, *ids) for ids in zip(made.prompt_ids, made.completion_ids, strict=True)] for m in (other, sft)
    )
    tokens, metrics = sum(map(len, made.completion_ids)), found["models"]["other"]
    kl = sum(own) - sum(under_sft)
    assert abs(kl) > 0.1 and metrics["kl"] == pytest.approx(kl / len(PROMPTS), abs=1e-4)
    assert metrics["kl_per_token"] == pytest.approx(kl / tokens, abs=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(-sum(under_sft) / tokens), rel=1e-4)
    assert found["models"]["sft"]["kl"] == 0.0
    total = length = 0
    for line in lines:
        text = line["models"]["other"]["completion"]
        before, whole = (bpe_tokens(part)["input_ids"] for part in (line["prompt"], line["prompt"] + text))
        assert whole[: len(before)] == before  # a completion begins with a blank, as words of this vocabulary do
        total, length = total + directly(bpe, before, whole[len(before) :]), length + len(whole) - len(before)
    assert length > 10 and metrics["perplexity_other"] == pytest.approx(math.exp(-total / length), rel=1e-4)


def test_the_reference_is_the_recipes(tmp_path, policy_folder, other_folder):
    models = {"sft": policy_folder, "other": other_folder}
    found, _ = read(run_eval(recipe_of(tmp_path, models, "eval.reference=other")))
    assert found["reference"] == "other" and found["models"]["other"]["kl"] == 0.0 != found["models"]["sft"]["kl"]
    assert "about other" in (tmp_path / "runs/r/eval/eval.md").read_text()
    with pytest.raises(RecipeError, match=r"eval\.reference: ppo is not in eval\.models; they are: sft, other\."):
        Run(recipe_of(tmp_path, models, "eval.reference=ppo"), "eval")


def test_scores_texts_and_lengths_are_those_of_the_completions(tmp_path, policy_folder, other_folder, sampled):
    ends = {prompt: " ".join(WORDS[i:] + WORDS[:i]) for i, prompt in enumerate(PROMPTS)}
    rewards = "[{name: 'mine.py:length'}, {name: 'mine.py:only_long', weight: 2.0}]"
    recipe = recipe_of(
        tmp_path,
        {"sft": policy_folder, "other": other_folder},
        f"eval.held_out_funcs=[{{name: '{tmp_path}/mine.py:dice'}}]",
        "eval.positive_threshold=60",
        "eval.num_samples=3",
        rows=[{"prompt": prompt, "completion": end} for prompt, end in ends.items()],
        rewards=rewards,
    )
    run = run_eval(recipe)
    found, lines = read(run)
    assert found["samples"] == lines[:3] and run.results == found["models"] and found["num_prompts"] == len(PROMPTS)
    assert found["paths"] == {"sft": str(policy_folder), "other": str(other_folder)}
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS) and not (run.path / PARTS).exists()
    assert all(line["gold"] == ends[line["prompt"]] for line in lines)
    for i, name in enumerate(found["models"]):
        metrics, answers, made = found["models"][name], [line["models"][name] for line in lines], of_model(sampled, i)
        texts = [answer["completion"] for answer in answers]
        assert texts == made.completions
        lengths, scores = [float(len(text)) for text in texts], [answer["score"] for answer in answers]
        for answer, text in zip(answers, texts, strict=True):
            long = float(len(text)) if len(text) > 20 else None
            assert answer["scores"] == {"length": len(text), "only_long": long}
            assert answer["score"] == len(text) + 2 * (long or 0) and 0 <= answer["held_out"] < 1
        assert metrics["score_mean"] == pytest.approx(fmean(scores)) and metrics["score_std"] == pytest.approx(
            pstdev(scores)
        )
        assert (metrics["score_min"], metrics["score_max"]) == (min(scores), max(scores))
        assert metrics["positive_share"] == fmean(score > 60 for score in scores)
        assert metrics["score/length/min"] == min(lengths) and metrics["score/length/max"] == max(lengths)
        long = [length for length in lengths if length > 20]
        assert metrics["score/only_long"] == pytest.approx(fmean(long)) and metrics["score/only_long/min"] == min(long)
        assert (
            metrics["held_out_mean"] == metrics["held_out/dice"] == pytest.approx(fmean(a["held_out"] for a in answers))
        )
        assert [answer["finished"] for answer in answers] == made.finished
        words = [ids[:-1] if done else ids for ids, done in zip(made.completion_ids, made.finished, strict=True)]
        assert [answer["tokens"] for answer in answers] == list(map(len, words))
        counts = found["length_histograms"]["counts"][name]  # a token a bin: the mean follows from them
        assert found["length_histograms"]["edges"] == list(range(14)) and sum(counts) == len(PROMPTS)
        assert metrics["length_mean"] == pytest.approx(sum(n * count for n, count in enumerate(counts)) / len(PROMPTS))
        assert metrics["eos_rate"] == fmean(made.finished)
        pairs = [tuple(ids[i : i + 3]) for ids in words for i in range(len(ids) - 2)]
        assert metrics["distinct_3"] == pytest.approx(len(set(pairs)) / len(pairs))
        expected = rouge(texts, [ends[line["prompt"]] for line in lines])
        assert {kind: metrics[kind] for kind in expected} == expected and expected["rouge1"] > 0
    page = (run.path / "eval.md").read_text()
    assert "| sft |" in page and "| other |" in page and "ROUGE-L" in page and "7 prompts" in page


def test_without_completions_in_the_data_there_is_no_rouge(tmp_path, policy_folder):
    recipe = recipe_of(tmp_path, {"sft": policy_folder}, "data.prompt_tokens=[2, 3]", rows=REVIEWS)
    found, lines = read(run_eval(recipe))
    assert (
        "rouge1" not in found["models"]["sft"]
        and "gold" not in lines[0]
        and "perplexity_other" not in found["models"]["sft"]
    )


def test_empty_completions_are_counted():
    made = Samples([[5]] * 4, [[1], [5, 1], [0, 1], [5]], ["", " the", "  ", " the"], [True, True, True, False])
    found = evaluator._text_metrics(made)
    assert found["empty_share"] == 0.5 and found["length_mean"] == 0.75 and found["unique_token_ratio"] == 1.0
    nothing = evaluator._text_metrics(Samples([[5]], [[1]], [""], [True]))
    assert nothing["unique_token_ratio"] is None and nothing["distinct_1"] == nothing["repetition"] == 0.0


def test_a_reward_function_that_never_applies_has_no_mean():
    found = evaluator._score_metrics([1.0, None], {"a": [1.0, None], "b": [None, None]}, 0.0)
    assert found["score_mean"] == found["positive_share"] == found["score/a"] == 1.0 and found["score/a/std"] == 0.0
    assert [found[key] for key in ("score/b", "score/b/std", "score/b/min", "score/b/max")] == [None] * 4
    with pytest.raises(RecipeError, match="no reward function applies"):
        evaluator._score_metrics([None], {"a": [None]}, 0.0)


def test_likelihoods_that_are_not_finite_are_not_known():
    found = evaluator._likelihood_metrics([-3.0, -5.0], [-4.0, -6.5], tokens=4)
    assert found == {"kl": 1.25, "kl_per_token": 0.625, "perplexity": pytest.approx(math.exp(10.5 / 4))}
    for own, under in (([math.nan], [-1.0]), ([-1.0], [-math.inf]), ([], [])):
        assert evaluator._likelihood_metrics(own, under, 2) == dict.fromkeys(("kl", "kl_per_token", "perplexity"))


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_model_that_has_diverged_is_refused(name, tmp_path, policy_folder):
    tokenizer = word_tokenizer()
    model = causal_lm(tokenizer)
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    folder = save_pair(tmp_path / "diverged", model, tokenizer)
    models = {"sft": policy_folder, "ppo": policy_folder} | {name: folder}
    with pytest.raises(
        RecipeError, match=rf"eval.models.{name}: the weights of .* are not finite \(transformer.ln_f.weight\)"
    ):
        run_eval(recipe_of(tmp_path, models))


def test_a_model_whose_likelihoods_are_not_finite_is_refused(tmp_path, policy_folder):
    """Finite weights, too large for a finite output."""
    tokenizer = word_tokenizer()
    model = causal_lm(tokenizer)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1e20)
        model.lm_head.weight.mul_(1e25)
    folder = save_pair(tmp_path / "diverged", model, tokenizer)
    with pytest.raises(RecipeError, match="eval.models.ppo: the likelihoods of its own completions are not finite"):
        run_eval(recipe_of(tmp_path, {"sft": policy_folder, "ppo": folder}))


def test_tokens_that_the_reference_does_not_have_leave_the_kl_unknown(tmp_path, policy_folder):
    """The same tokenizer, but rows of the embeddings to spare, as GPT-NeoX has them; here they are written from."""
    tokenizer = word_tokenizer()
    spare = save_pair(tmp_path / "spare", causal_lm(tokenizer, vocab_size=len(tokenizer) + 60), tokenizer)
    found, _ = read(run_eval(recipe_of(tmp_path, {"sft": policy_folder, "spare": spare})))
    assert found["models"]["spare"]["kl"] is found["models"]["spare"]["perplexity"] is None
    assert [note.partition(",")[0] for note in found["notes"]] == ["spare: under sft"]
    found, _ = read(
        run_eval(recipe_of(tmp_path, {"sft": policy_folder, "spare": spare}, "eval.reference=spare", "name=b"))
    )
    assert found["models"]["sft"]["kl"] is not None and found["notes"] == []


# Likelihoods


@pytest.fixture
def words():
    tokenizer = word_tokenizer()
    return causal_lm(tokenizer).eval(), tokenizer


def test_sequence_logps_are_the_same_in_any_batch(words):
    model, tokenizer = words
    prompts, completions = [[5, 6], [7], [8, 9, 10, 11]], [[12], [13, 14, 15], []]
    expected = [directly(model, *ids) for ids in zip(prompts, completions, strict=True)]
    assert sequence_logps(model, tokenizer, prompts, completions) == pytest.approx(expected, abs=1e-5)
    assert sequence_logps(model, tokenizer, prompts[2:], completions[2:]) == [0.0]


def test_a_text_longer_than_the_context_loses_its_beginning(words):
    model, tokenizer = words
    prompt, completion = " ".join(["the film was"] * 22), " very great ."
    sums, counts = text_logps(model, tokenizer, [prompt], [completion])
    ids = tokenizer(prompt + completion)["input_ids"]
    assert counts == [3] and len(ids) == 69
    assert sums == pytest.approx([directly(model, ids[-64:-3], ids[-3:])], abs=1e-5)
    sums, counts = text_logps(model, tokenizer, ["the"], [prompt[3:]])  # longer than the context itself
    assert counts == [63] and sums == pytest.approx([directly(model, ids[:1], ids[1:64])], abs=1e-4)


def test_tokens_over_the_end_of_a_prompt_belong_to_the_completion():
    tokenizer = bpe_tokenizer()
    model = causal_lm(tokenizer).eval()
    whole, before = (tokenizer(text)["input_ids"] for text in ("the film was great", "the film was gr"))
    same = next(i for i in range(len(before)) if before[i] != whole[i])  # "great" is a token, and no part of it is
    sums, counts = text_logps(model, tokenizer, ["the film was gr", "the film"], ["eat", ""])
    assert counts == [len(whole) - same, 0] and same < len(before)
    assert sums == pytest.approx([directly(model, whole[:same], whole[same:]), 0.0], abs=1e-5)


def test_chat_prompts_are_read_by_the_template_or_as_plain_text(words):
    model, tokenizer = words
    prompt, completion = [{"role": "user", "content": "the film"}], [{"role": "assistant", "content": "was great"}]
    plain, _ = text_logps(model, tokenizer, [prompt], [completion])
    assert plain == pytest.approx(
        [directly(model, *(tokenizer(t)["input_ids"] for t in ("the film", "was great")))], abs=1e-5
    )
    tokenizer.chat_template = CHAT
    chat, counts = text_logps(model, tokenizer, [prompt], [completion])
    ids = [tokenizer(text)["input_ids"] for text in ("the film it", "was great")]
    assert counts == [2] and chat == pytest.approx([directly(model, *ids)], abs=1e-5)


# Any set of models


def test_a_model_with_another_tokenizer_is_measured_but_for_kl(tmp_path, policy_folder, bpe_policy_folder, sampled):
    """Its pad token is its EOS token, too."""
    models = {"sft": policy_folder, "bpe | x": bpe_policy_folder}
    run = run_eval(recipe_of(tmp_path, models, f"eval.perplexity_model={policy_folder}"))
    found, lines = read(run)
    sft, bpe = found["models"].values()
    assert bpe["kl"] is bpe["kl_per_token"] is bpe["perplexity"] is None and sft["kl"] == 0.0
    assert bpe["perplexity_other"] > 1 and sft["perplexity_other"] > 1 and bpe["score_mean"] < 0
    (note,) = found["notes"]
    assert (
        note.startswith("bpe | x has another tokenizer than sft: no KL")
        and "bpe \\| x has" in (run.path / "eval.md").read_text()
    )
    tokenizer, first = sampled[2]
    assert tokenizer.pad_token == tokenizer.eos_token
    assert [tokenizer.decode(ids) for ids in first.prompt_ids] == [line["prompt"] for line in lines[:4]]


@pytest.mark.parametrize("pad", ["<eos>", "<pad>"])
def test_pad_tokens_hide_no_eos(pad, tmp_path, sampled):
    tokenizer = word_tokenizer(pad_token=pad)
    folder = save_pair(tmp_path / "m", causal_lm(tokenizer), tokenizer)
    rows = [{"prompt": " ".join(["the"] * (1 + i % 5))} for i in range(40)]
    found, lines = read(run_eval(recipe_of(tmp_path, {"sft": folder}, "eval.batch_size=20", rows=rows)))
    made = of_model(sampled, 0)
    assert [line["models"]["sft"]["finished"] for line in lines] == [ids[-1] == 1 for ids in made.completion_ids]
    assert tokenizer.eos_token_id == 1 and 0 < found["models"]["sft"]["eos_rate"] < 1
    model, _ = load(folder)
    under = [directly(model, *ids) for ids in zip(made.prompt_ids, made.completion_ids, strict=True)]
    expected = perplexity(under, sum(map(len, made.completion_ids)))
    assert found["models"]["sft"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_chat_prompts(tmp_path, policy_folder, sampled):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    chat = save_pair(tmp_path / "chat", causal_lm(tokenizer), tokenizer)
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    recipe = recipe_of(tmp_path, {"sft": chat}, f"eval.perplexity_model={policy_folder}", rows=rows)
    found, lines = read(run_eval(recipe))
    assert (
        lines[0]["models"]["sft"]["completion"][0]["role"] == "assistant"
        and found["models"]["sft"]["perplexity_other"] > 1
    )
    assert tokenizer.decode(sampled[0][1].prompt_ids[0]) == f"{lines[0]['prompt'][0]['content']} it"
    del sampled[:]
    models = {"sft": chat, "a": policy_folder, "b": policy_folder}
    with pytest.raises(
        RecipeError, match=r"(?s)eval\.models\.a: .* no chat template.*\neval\.models\.b: .* no chat template"
    ):
        run_eval(recipe_of(tmp_path, models, "name=mixed", rows=rows))
    assert sampled == []


@pytest.mark.parametrize("missing", ["eval.models.ppo", "eval.perplexity_model"])
def test_a_model_that_is_not_there_stops_eval_before_anything_is_sampled(missing, tmp_path, policy_folder, sampled):
    models = {"sft": policy_folder, "ppo": policy_folder}
    recipe = recipe_of(tmp_path, models, f"{missing}=stage:ppo", "ppo={}")
    for ask in (lambda: check_references(recipe, "eval"), lambda: run_eval(recipe)):
        with pytest.raises(RecipeError, match=rf"{missing}: stage ppo of r has not run .* First: rlhf-recipes ppo r"):
            ask()
    assert sampled == []


def test_what_else_is_measured_changes_no_model(tmp_path, policy_folder, other_folder):
    """New rows of the embeddings, reward functions that draw, and the samples themselves."""
    tokenizer = word_tokenizer(pad_token=None)
    without_pad = save_pair(tmp_path / "without_pad", causal_lm(tokenizer, seed=3, pad_token_id=None), tokenizer)
    rewards, found = "[{name: 'mine.py:dice'}]", []
    for models in (
        {"sft": without_pad, "a": policy_folder, "b": without_pad},
        {"b": without_pad},
    ):
        overrides = (f"name=of_{len(models)}", 'special_tokens={pad_token: "[PAD]"}')
        _, lines = read(run_eval(recipe_of(tmp_path, models, *overrides, rewards=rewards)))
        found.append([line["models"]["b"] for line in lines])
    assert found[0] == found[1]


def test_eval_measures_base_sft_ppo_and_rloo():
    def names(recipe, *overrides):
        loaded = load_recipe(recipe, list(overrides))
        return list(eval_models(loaded)), eval_reference(loaded)

    assert names("imdb_tiny") == (["base", "sft", "ppo", "rloo"], "sft")
    assert eval_models(load_recipe("imdb_tiny"))["base"] == "package:rlhf_recipes/base"
    assert names("imdb_tiny", "ppo=null") == (["base", "sft", "rloo"], "sft")
    assert names("imdb_tiny", "sft.model=null", "sft.scratch={}")[0] == [
        "sft",
        "ppo",
        "rloo",
    ]  # new: nothing to measure
    assert names("imdb_tiny", "ppo.policy=package:rlhf_recipes/base")[0] == ["sft", "ppo", "rloo"]  # not trained on
    assert names("imdb_positive") == (["sft", "ppo", "rloo"], "sft")  # it has no stage sft
    assert names("imdb_tiny", "eval.reference=base") == (["base", "sft", "ppo", "rloo"], "base")
    assert names("imdb_tiny", "eval.models={a: x/y, b: stage:ppo}") == (["a", "b"], "a")
    assert names("imdb_tiny", "eval.models={a: x/y, sft: stage:sft}") == (["a", "sft"], "sft")


# Stopped and resumed

FILES = ("eval.json", "eval.md", "completions.jsonl")


@pytest.mark.parametrize("changed", [False, True])
def test_a_failed_eval_goes_on_with_the_next_model(
    changed, tmp_path, policy_folder, other_folder, sampled, monkeypatch
):
    first = tmp_path / "first"
    shutil.copytree(policy_folder, first)
    models = {"sft": policy_folder, "a": first, "b": other_folder}
    recipe = recipe_of(tmp_path, models, "eval.reference=b", rewards="[{name: 'mine.py:breaks_at_second_model'}]")
    whole = run_eval(recipe.model_copy(update={"runs_dir": f"{tmp_path}/whole"}))
    del sampled[:]
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(RecipeError, match="out of luck"):
        run_eval(recipe)
    monkeypatch.delenv("FAIL")
    run_id = read_manifest(tmp_path / "runs/r/eval")["id"]
    assert len(sampled) == 4 and len(list((tmp_path / "runs/r/eval" / PARTS).iterdir())) == 1
    if changed:
        os.utime(policy_folder / "model.safetensors", (1, 1))  # written anew since
    run = run_eval(recipe)
    assert len(sampled) == (10 if changed else 8)
    assert {path.name for path in run.path.parent.iterdir()} == {"eval"} and is_finished(run.path)
    assert read_manifest(run.path)["id"] == run_id and len(read_manifest(run.path)["resumed"]) == 1
    for name in FILES:
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    assert {path.name for path in run.path.iterdir()} == {*FILES, "manifest.json", "recipe.yaml"}


def test_should_the_tracker_fail_nothing_is_measured_again(tmp_path, policy_folder, sampled, monkeypatch):
    def fail(*_):
        raise RecipeError("no W&B")

    recipe = recipe_of(tmp_path, {"sft": policy_folder})
    with monkeypatch.context() as patch, pytest.raises(RecipeError, match="no W&B"):
        patch.setattr(evaluate, "log_eval", fail)
        run_eval(recipe)
    del sampled[:]
    run = run_eval(recipe)
    assert sampled == [] and is_finished(run.path) and not (run.path / PARTS).exists()


@pytest.mark.slow
def test_stopped_it_says_that_it_goes_on(tmp_path, policy_folder, other_folder):
    recipe_of(tmp_path, {"a": policy_folder, "b": other_folder}, rewards="[{name: 'mine.py:breaks_at_second_model'}]")
    command = [sys.executable, "-m", "rlhf_recipes.evaluate", "--recipe", str(tmp_path / "r.yaml")]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"HANG": "1"}, stdout=subprocess.PIPE, text=True)
    parts = tmp_path / "runs/r/eval" / PARTS
    while process.poll() is None and not (parts.is_dir() and list(parts.glob("[!.]*"))):
        time.sleep(0.05)
    process.terminate()
    assert (
        "eval     stopped, the same command resumes with the model that was being measured" in process.communicate()[0]
    )


@pytest.mark.slow
def test_killed_at_any_time_it_comes_to_the_same_result(tmp_path, policy_folder, other_folder):
    models = {"sft": policy_folder, "other": other_folder}
    recipe_of(tmp_path, models, rewards="[{name: 'mine.py:breaks_at_second_model'}]")
    command = ["-m", "rlhf_recipes.evaluate", "--recipe", str(tmp_path / "r.yaml")]
    whole = run_python(*command, f"runs_dir={tmp_path}/whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=os.environ | {"HANG": "1"})
    parts = tmp_path / "runs/r/eval" / PARTS
    while process.poll() is None and not (parts.is_dir() and list(parts.glob("[!.]*"))):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not any((parts.parent / name).exists() for name in FILES)
    done = run_python(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in FILES:
        assert (parts.parent / name).read_bytes() == (tmp_path / "whole/r/eval" / name).read_bytes(), name
    assert len(read_manifest(parts.parent)["resumed"]) == 1 and not parts.exists()
    again = run_python(*command, cwd=tmp_path)
    assert again.returncode == 0 and "nothing to do" in again.stdout


def test_a_run_elsewhere_that_ran_anew_is_measured_anew(tmp_path, policy_folder):
    elsewhere = tmp_path / "duel/ppo"
    shutil.copytree(policy_folder, elsewhere)
    for run_id in ("first", "second"):
        (elsewhere / "manifest.json").write_text(json.dumps({"status": "finished", "id": run_id}))
        recipe = recipe_of(tmp_path, {"sft": policy_folder, "ppo": elsewhere})
        if run_id == "first":
            assert run_eval(recipe).is_done()
    with pytest.raises(RecipeError, match=f"stage {elsewhere} has run again since"):
        Run(recipe, "eval").is_done()


def test_another_length_of_training_is_another_eval(tmp_path, policy_folder):
    def recipe(length, *overrides):
        settings = f"ppo={{policy: {policy_folder}, trainer: {{max_completion_length: {length}}}}}"
        return recipe_of(tmp_path, {"sft": policy_folder}, settings, *overrides)

    run = run_eval(recipe(5, "eval.max_new_tokens=null"))
    assert read(run)[0]["length_histograms"]["edges"][-1] == 6 and run.is_done()
    with pytest.raises(RecipeError, match="max_completion_length: 5 -> 6"):
        Run(recipe(6, "eval.max_new_tokens=null"), "eval").is_done()
    settings = [Run(recipe(length), "eval").settings for length in (5, 6)]
    assert settings[0] == settings[1]  # eval has a length of its own


def test_progress_is_told_by_batches(tmp_path, policy_folder):
    recipe = recipe_of(tmp_path, {"sft": policy_folder})
    tokenizers = {"sft": load_tokenizer(recipe, "x", str(policy_folder))}
    told, rows = [], evaluator.held_out_prompts(recipe, tokenizers["sft"])
    part = evaluator.Evaluator(recipe, tokenizers, rows, 4).measure("sft", told.append)
    assert told == [4, 3] and len(part["answers"]) == 7

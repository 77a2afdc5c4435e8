"""What stages sft and reward say about the models that they leave: the numbers are those of the saved models."""

import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardTrainer
from trl.trainer import utils

from rlhf_recipes import reward, sft
from rlhf_recipes.evaluation.bound import announce, drawn, usual_rows
from rlhf_recipes.evaluation.metrics import rouge
from rlhf_recipes.evaluation.reward_quality import kept_pairs, measure
from rlhf_recipes.evaluation.sft_quality import SAMPLES
from rlhf_recipes.models.new_weights import scale_head
from rlhf_recipes.models.samples import shared_out
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards import reader
from rlhf_recipes.rewards.classifier import label_values
from rlhf_recipes.rewards.functions import reward_model
from rlhf_recipes.runs.files import REWARD_REPORT
from rlhf_recipes.runs.folder import Run
from support.processes import run_python
from support.texts import REVIEWS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

PROMPTS = ("the film", "it", "the plot and the acting", "a movie", "the acting")
GOOD = (" was great .", " was very good and fun .", " was not awful !", " i liked it")
BAD = (" was bad", " was awful and very dull .", " was not fun !", " i hated it .")
PAIRS = [
    {"prompt": prompt, "chosen": good, "rejected": bad, "completion": good}
    for prompt in PROMPTS
    for good, bad in zip(GOOD, BAD, strict=True)
]
HELD_OUT = PAIRS[:16]


def recipe_of(tmp_path, text, rows=PAIRS, held_out=HELD_OUT, *overrides):
    (tmp_path / "data").mkdir(exist_ok=True)
    write_jsonl(tmp_path / "data/train.jsonl", rows)
    write_jsonl(tmp_path / "data/test.jsonl", held_out)
    head = f"name: r\ndescription: d\nruns_dir: {tmp_path}/runs\nreward_funcs: [{{name: length}}]\n"
    data = f"data: {{path: {tmp_path}/data, eval_split: test}}\n"
    (tmp_path / "r.yaml").write_text(head + data + text)
    return load_recipe(str(tmp_path / "r.yaml"), list(overrides))


def run_stage(module, stage, recipe):
    run = Run(recipe, stage)
    run.start()
    line = module.main(run)
    return run, line


def lines_of(run):
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def scores_of(folder, rows, side):
    texts = {"prompts": [row["prompt"] for row in rows], "completions": [row[side] for row in rows]}
    return reward_model(str(folder))(**texts, finished=[True] * len(rows))


def mean(values):
    return sum(values) / len(values)


# Stage reward


def by_length(texts):
    return [float(len(prompt) + len(completion)) for prompt, completion in texts]


MEASURED = Dataset.from_list(
    [
        {"prompt": "a", "chosen": "aaaa", "rejected": "a"},  # 5 against 2
        {"prompt": "a", "chosen": "a", "rejected": "aaa"},  # 2 against 4
        {"prompt": "", "chosen": "aa", "rejected": "aa"},  # a tie
        {"prompt": "", "chosen": "aaa", "rejected": "aa"},  # 3 against 2
    ]
)


@pytest.mark.parametrize(("center", "shift"), [("pairs", 22 / 8), ("gold", 7.0), ("none", 0.0)])
def test_measure_by_hand(center, shift):
    found = measure(by_length, MEASURED.select([0, 3]), MEASURED, [("a", "aaa"), ("aaaaa", "aaaaa")], center)
    assert found["train_accuracy"] == 1.0 and found["eval_accuracy"] == 0.5 and found["score_center"] == shift
    assert found["score_chosen_mean"] == 3.0 - shift and found["score_chosen_std"] == pytest.approx(math.sqrt(1.5))
    assert found["score_rejected_mean"] == 2.5 - shift and found["score_gold_mean"] == 7.0 - shift
    assert [part["pairs"] for part in found["accuracy_by_margin"]] == [1, 1, 1, 1]
    assert found["accuracy_by_margin"][-1] == {"from": 3.0, "to": 3.0, "pairs": 1, "accuracy": 1.0}
    p = [1 / (1 + math.exp(-margin)) for margin in (3, -2, 0, 1)]
    assert found["eval_brier"] == pytest.approx(mean([(1 - each) ** 2 for each in p]))


def test_measure_without_references_and_without_prompts():
    pairs = MEASURED.remove_columns("prompt")
    found = measure(by_length, pairs, pairs, [], "none")
    assert found["train_accuracy"] == 0.5 and "score_gold_mean" not in found


def test_a_model_that_has_diverged_is_refused():
    with pytest.raises(RecipeError, match=r"reward\.trainer: 12 scores of the trained model are nan"):
        measure(lambda texts: [math.nan] * len(texts), MEASURED, MEASURED, [], "none")


def backbone(folder, kind):
    """A random model without a scalar head, and its tokenizer."""
    if kind in ("gpt2", "gpt_neox"):
        tokenizer = word_tokenizer()
        return save_pair(folder, causal_lm(tokenizer, kind), tokenizer)
    from transformers import DebertaV2Config, DebertaV2Model, DistilBertConfig, DistilBertModel

    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    torch.manual_seed(0)
    if kind == "distilbert":
        model = DistilBertModel(DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2))
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        model = DebertaV2Model(DebertaV2Config(vocab_size=len(tokenizer), pooler_hidden_size=32, **sizes))
    return save_pair(folder, model, tokenizer)


def reward_recipe(tmp_path, model, *overrides, **more):
    trainer = "{max_steps: 4, learning_rate: 1e-2, per_device_eval_batch_size: 8, max_length: 24}"
    return recipe_of(
        tmp_path, f"reward: {{model: {model}, trainer: {trainer}}}\n", PAIRS, more.get("held_out", HELD_OUT), *overrides
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "distilbert", "deberta"])
def test_what_stage_reward_reports_is_what_the_reward_function_says(kind, tmp_path):
    """One held-out pair is too long: TRL leaves it out, so do we."""
    long = {"prompt": "it", "chosen": " was good" * 20, "rejected": " bad", "completion": " was good"}
    recipe = reward_recipe(tmp_path, backbone(tmp_path / "base", kind), held_out=[*HELD_OUT[:3], long, *HELD_OUT[3:]])
    run, line = run_stage(reward, "reward", recipe)
    report = json.loads((run.path / REWARD_REPORT).read_text())
    assert {name: report[name] for name in run.results} == run.results
    assert run.results["eval_pairs"] == 16 and run.results["train_pairs"] == 20
    assert f"{run.results['eval_accuracy']:.1%} on 16 pairs" in line

    chosen, rejected = (scores_of(run.path, HELD_OUT, side) for side in ("chosen", "rejected"))
    assert run.results["eval_accuracy"] == mean([c > r for c, r in zip(chosen, rejected, strict=True)])
    assert run.results["score_chosen_mean"] == pytest.approx(mean(chosen), abs=1e-5)
    assert run.results["score_rejected_mean"] == pytest.approx(mean(rejected), abs=1e-5)
    assert max(chosen + rejected) - min(chosen + rejected) > 1e-3  # not one number for all
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    assert report["eval_loss"] == pytest.approx(mean([math.log1p(math.exp(-m)) for m in margins]), abs=1e-5)
    assert sum(part["pairs"] for part in report["accuracy_by_margin"]) == 16
    assert sum(part["pairs"] for part in report["calibration"]) == 16
    assert mean(chosen + rejected) == pytest.approx(0, abs=1e-5)  # center: pairs


@pytest.mark.slow
def test_references_score_zero_on_average(tmp_path):
    model = backbone(tmp_path / "base", "gpt2")
    run, _ = run_stage(reward, "reward", reward_recipe(tmp_path, model, "reward.center=gold"))
    assert mean(scores_of(run.path, HELD_OUT, "completion")) == pytest.approx(0, abs=1e-5)
    assert run.results["score_gold_mean"] == pytest.approx(0, abs=1e-9) and run.results["score_center"] != 0
    none, _ = run_stage(reward, "reward", reward_recipe(tmp_path, model, "reward.center=none", "name=none"))
    raw = scores_of(none.path, HELD_OUT, "completion")
    assert none.results["score_center"] == 0
    assert mean(raw) == pytest.approx(none.results["score_gold_mean"], abs=1e-5)
    assert mean(raw) == pytest.approx(run.results["score_center"], abs=1e-5)  # the same training, but for the shift


@pytest.mark.slow
def test_two_processes_share_the_scoring(tmp_path):
    """An odd number of pairs; what both report together is what the saved model says about all of them."""
    reward_recipe(tmp_path, backbone(tmp_path / "base", "gpt2"), held_out=HELD_OUT[:15])
    (tmp_path / "two.yaml").write_text(
        "distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 2\nmixed_precision: 'no'\nuse_cpu: false\n"
        "main_process_port: 0\n"
    )
    launch = ("-m", "accelerate.commands.launch", "--config_file", "two.yaml", "-m", "rlhf_recipes.reward")
    done = run_python(*launch, "--recipe", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs/r/reward" / REWARD_REPORT).read_text())
    chosen, rejected = (scores_of(tmp_path / "runs/r/reward", HELD_OUT[:15], side) for side in ("chosen", "rejected"))
    assert report["eval_pairs"] == 15 and report["score_chosen_mean"] == pytest.approx(mean(chosen), abs=1e-5)
    assert report["score_rejected_mean"] == pytest.approx(mean(rejected), abs=1e-5)
    assert report["eval_accuracy"] == mean([c > r for c, r in zip(chosen, rejected, strict=True)])


@pytest.mark.slow
def test_the_held_out_loss_is_that_of_trl_and_every_text_is_scored_once(tmp_path, monkeypatch, capsys):
    """TRL evaluates in the last step; then the stage scores the same six pairs, with their margins, by itself."""
    scored, evaluate = [], RewardTrainer.evaluate
    held_out = [row | {"margin": 0.1 * i} for i, row in enumerate(HELD_OUT)]
    asked = ("eval_rows=6", "trainer.center_rewards_coefficient=0.5", "trainer.eval_strategy=steps")
    overrides = [f"reward.{key}" for key in (*asked, "trainer.eval_steps=4", "trainer.per_device_eval_batch_size=3")]
    recipe = reward_recipe(tmp_path, backbone(tmp_path / "base", "gpt2"), *overrides, held_out=held_out)
    write_jsonl(tmp_path / "data/train.jsonl", [row | {"margin": 1.0} for row in PAIRS])
    monkeypatch.setattr(reader, "label_values", lambda *given: scored.append(len(given[1])) or label_values(*given))
    monkeypatch.setattr(
        RewardTrainer, "evaluate", lambda self, **given: scored.append("TRL") or evaluate(self, **given)
    )
    run, _ = run_stage(reward, "reward", recipe)
    assert scored == ["TRL", 6, 6, 6, 6, 6]  # both texts of training and held-out pairs, then gold texts
    assert "measures 6 held-out pairs, 6 training pairs, 6 gold texts, about " in capsys.readouterr().out
    theirs, ours = (line for line in lines_of(run) if "eval_loss" in line)
    report = json.loads((run.path / REWARD_REPORT).read_text())
    assert report["eval_pairs"] == 6 and theirs["step"] == 4
    for name in ("eval_loss", "eval_accuracy"):
        assert report[name] == ours[name] == pytest.approx(theirs[name], abs=1e-5)


def test_rows_to_measure_follow_from_the_rows_of_training():
    args = SimpleNamespace(max_steps=30, per_device_train_batch_size=4, gradient_accumulation_steps=2, world_size=10)
    assert usual_rows(args, 0) == 0.15 * 30 * 80
    args.max_steps = 5
    assert usual_rows(args, 10**6) == 64
    args.max_steps, args.num_train_epochs = -1, 2.0
    assert usual_rows(args, 92832) == round(0.3 * 92832)


def test_rows_are_drawn_by_the_seed():
    rows = Dataset.from_dict({"row": list(range(9))})
    some = [drawn(rows, 4, seed)["row"][:] for seed in (1, 1, 2)]
    assert some[0] == some[1] != some[2] and len(set(some[0])) == 4
    assert drawn(rows, 9, 1)["row"][:] == list(range(9))


def test_the_time_of_measuring_follows_from_the_training(capsys):
    """40 rows in 12 s are 0.3 s for each; a forward pass takes a third of it."""
    args = SimpleNamespace(per_device_train_batch_size=4, gradient_accumulation_steps=1, world_size=1)
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(global_step=30), _initial_global_step=20)
    run = SimpleNamespace(stage="reward", is_main=True)
    announce(run, trainer, 12.0, {"held-out pairs": 50, "training pairs": 20, "gold texts": 0})
    trainer._initial_global_step = 30
    announce(run, trainer, 12.0, {"held-out pairs": 50})
    said = "reward   measures 50 held-out pairs, 20 training pairs, about 7 s\nreward   measures 50 held-out pairs\n"
    assert capsys.readouterr().out == said


def test_a_gold_center_needs_completions(tmp_path, policy_folder):
    settings = f"reward: {{model: {policy_folder}, center: gold}}\n"
    for rows in (REVIEWS, [{"prompt": "it", "chosen": " was good", "rejected": " was bad"}] * 4):
        run = Run(recipe_of(tmp_path, settings, rows[::2], rows[1::2]), "reward")
        with pytest.raises(RecipeError, match=r"reward\.center: gold .* no rows with prompt and completion"):
            reward.main(run)


def test_pairs_that_are_all_too_long_are_refused(tmp_path, policy_folder):
    settings = f"reward: {{model: {policy_folder}, trainer: {{max_length: 5}}}}\n"
    rows = [{"chosen": " was good and fun and great", "rejected": " was bad"}]
    short = [{"chosen": " good", "rejected": " bad"}]
    run = Run(recipe_of(tmp_path, settings, short, rows), "reward")
    with pytest.raises(
        RecipeError, match=r"reward\.trainer\.max_length: 1 of 1 pairs .* more than 5 tokens, so no pair is left"
    ):
        reward.main(run)


def test_pairs_that_are_left_out_are_counted(caplog):
    pairs = Dataset.from_dict({"row": [0, 1, 2]})
    args = SimpleNamespace(max_length=9)
    assert kept_pairs(pairs, pairs, args)["row"][:] == [0, 1, 2] and not caplog.records
    assert kept_pairs(pairs, pairs.select([2]), args)["row"][:] == [2]
    assert "reward.trainer.max_length: 2 of 3 pairs have a text of more than 9 tokens and are left out" in caplog.text


def wide_model(kind="llama", hidden=4096):
    """A sequence classifier with very many features and little else."""
    from transformers import AutoConfig

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 8}
    if kind == "llama":
        config = AutoConfig.for_model("llama", hidden_size=hidden, head_dim=8, num_key_value_heads=1, **sizes)
    else:
        config = AutoConfig.for_model("deberta-v2", hidden_size=hidden, pooler_hidden_size=hidden, **sizes)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def test_the_scaled_head_has_the_papers_deviation():
    model = wide_model()
    head = model.score.weight
    before = torch.random.get_rng_state()
    scale_head(model, seed=1)
    drawn = head.detach().clone()
    assert torch.equal(before, torch.random.get_rng_state())
    # The standard error of a deviation from 4096 normals is 1.1 %.
    assert drawn.std().item() == pytest.approx(4097**-0.5, rel=0.05)
    assert abs(drawn.mean().item()) < 4 * 4097**-0.5 / 64
    scale_head(model, seed=2)
    assert not torch.equal(head, drawn)
    scale_head(model, seed=1)
    assert torch.equal(head, drawn)


def test_a_head_with_a_bias_is_scaled_too():
    model = wide_model("deberta-v2", hidden=1024)
    torch.nn.init.ones_(model.classifier.bias)
    others = {name: weight.clone() for name, weight in model.named_parameters() if "classifier" not in name}
    scale_head(model, seed=0)
    assert model.classifier.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert model.classifier.bias.item() == 0
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in others.items())


def test_a_trained_head_stays(tmp_path, caplog):
    wide_model(hidden=64).save_pretrained(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    before = model.score.weight.detach().clone()
    scale_head(model, seed=0)
    assert torch.equal(before, model.score.weight) and "has a trained head" in caplog.text


def test_a_model_without_a_linear_head_is_refused():
    class Headless(torch.nn.Module):
        config = wide_model(hidden=16).config

    with pytest.raises(RecipeError, match=r"reward\.scale_head: Headless has no linear layer"):
        scale_head(Headless(), seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False])
def test_the_stage_scales_the_head_only_when_asked(scaled, tmp_path):
    """With learning rate 0 the saved head is the one that training began with."""
    recipe = reward_recipe(tmp_path, backbone(tmp_path / "base", "gpt2"), "reward.trainer.learning_rate=0.0")
    if scaled:
        recipe = recipe.model_copy(update={"reward": recipe.reward.model_copy(update={"scale_head": True})})
    run, _ = run_stage(reward, "reward", recipe)
    found = AutoModelForSequenceClassification.from_pretrained(run.path).score.weight
    expected = torch.randn(1, 32, generator=torch.Generator().manual_seed(recipe.seed)) * 33**-0.5
    assert torch.equal(found, expected) == scaled
    assert (found.std() > 0.1) == scaled  # transformers: 0.02


# Stage sft


SUMMARIES = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
SFT = (
    "sft: {{model: {}, trainer: {{max_steps: 1, learning_rate: {}, per_device_eval_batch_size: 32, max_length: 24}}}}\n"
)


def cross_entropy(folder, rows):
    """Mean over the tokens that count, by hand: each row alone, without padding."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nll, tokens = 0.0, 0
    for context, ids in rows:
        with torch.no_grad():
            logps = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
        for i in range(max(len(context), 1), len(context) + len(ids)):
            nll -= logps[i - 1, (context + ids)[i]].item()
            tokens += 1
    return nll / tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["completion", "text"])
def test_the_loss_is_over_completions_where_there_are_prompts(kind, tmp_path, policy_folder):
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    rows = SUMMARIES if kind == "completion" else [{"text": row["prompt"] + row["completion"]} for row in SUMMARIES]
    run, _ = run_stage(sft, "sft", recipe_of(tmp_path, SFT.format(policy_folder, "1e-2"), rows, rows[:7]))
    assert utils._use_triton(torch.device("cpu")) == (kind == "completion")  # the head skips prompts
    ids = [
        ([] if kind == "text" else tokenizer(row["prompt"])["input_ids"], tokenizer(row[kind])["input_ids"] + [1])
        for row in rows[:7]
    ]
    assert tokenizer.eos_token_id == 1
    assert run.results["eval_loss"] == pytest.approx(cross_entropy(run.path, ids), abs=1e-4)
    other = [([], context + rest) if context else (rest[:2], rest[2:]) for context, rest in ids]
    assert run.results["eval_loss"] != pytest.approx(cross_entropy(run.path, other), abs=1e-3)
    assert run.results["eval_perplexity"] == pytest.approx(math.exp(run.results["eval_loss"]))


@pytest.mark.slow
def test_sft_measures_as_many_texts_as_the_recipe_says(tmp_path, policy_folder, capsys):
    rows = [{"text": row["prompt"] + row["completion"]} for row in SUMMARIES]
    recipe = recipe_of(tmp_path, SFT.format(policy_folder, "1e-2"), rows, rows[:9], "sft.eval_rows=2")
    run, _ = run_stage(sft, "sft", recipe)
    assert "sft      measures 2 held-out texts, about 0 s\n" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    measured = [rows[i]["text"] for i in random.Random(recipe.seed).sample(range(9), 2)]
    ids = [([], tokenizer(text)["input_ids"] + [1]) for text in measured]
    assert run.results["eval_loss"] == pytest.approx(cross_entropy(run.path, ids), abs=1e-4)


@pytest.mark.parametrize("side", ["training", "held-out"])
def test_prompts_that_leave_no_room_for_a_completion(side, tmp_path, policy_folder, caplog):
    long, short = ([{"prompt": "it was " * n + end, "completion": " good"} for end in ("a", "i")] for n in (40, 1))
    settings = SFT.format(policy_folder, "1e-2")
    rows = (long, short) if side == "training" else (long + short, long)
    with pytest.raises(
        RecipeError, match=rf"sft\.trainer\.max_length: 2 of 2 {side} prompts have 24 tokens or more, so"
    ):
        sft.main(Run(recipe_of(tmp_path, settings, *rows), "sft"))
    assert ("2 of 4 training prompts have 24 tokens or more and are left out" in caplog.text) == (side == "held-out")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lr_scheduler_kwargs={num_cycle: 2}", "lr_scheduler_kwargs.num_cycle: unknown key of linear"),
        ("dataset_text_field=body", "dataset_text_field: leave it out; data.columns.text"),
    ],
)
def test_trainer_arguments_that_cannot_be(setting, expected, tmp_path, policy_folder):
    recipe = recipe_of(tmp_path, SFT.format(policy_folder, "1e-2"), REVIEWS, REVIEWS, f"sft.trainer.{setting}")
    with pytest.raises(RecipeError, match=rf"sft\.trainer\.{expected}"):
        sft.main(Run(recipe, "sft"))


@pytest.mark.slow
def test_sft_that_has_diverged_is_refused(tmp_path, policy_folder):
    recipe = recipe_of(tmp_path, SFT.format(policy_folder, "1e30"), SUMMARIES, SUMMARIES, "sft.trainer.max_steps=3")
    with pytest.raises(RecipeError, match=r"the loss is nan, so training has diverged.*learning_rate is 1e\+30"):
        run_stage(sft, "sft", recipe)


@pytest.mark.slow
def test_a_model_that_never_sees_eos_is_warned_of(tmp_path, policy_folder, caplog):
    settings = SFT.format(policy_folder, "1e-2")
    run_stage(sft, "sft", recipe_of(tmp_path, settings, SUMMARIES, SUMMARIES))
    assert "does not learn to stop" not in caplog.text
    rows = [row | {"completion": " good" * 30} for row in SUMMARIES]
    run_stage(sft, "sft", recipe_of(tmp_path, settings, rows, rows, "name=long"))
    assert "none of the first 8 training rows ends with EOS, so the model does not learn to stop" in caplog.text


@pytest.mark.slow
def test_sft_reports_rouge_of_its_completions(tmp_path, policy_folder):
    """A model that has learned what follows a prompt says it, word by word, and then ends."""
    ends = dict(zip(PROMPTS, GOOD + GOOD, strict=False))
    rows = [{"prompt": prompt, "completion": end} for prompt, end in ends.items()]
    trainer = "{max_steps: 60, learning_rate: 1e-2, per_device_train_batch_size: 5, lr_scheduler_type: constant}"
    settings = f"sft: {{model: {policy_folder}, rouge_prompts: 4, trainer: {trainer}}}\n"
    run, line = run_stage(sft, "sft", recipe_of(tmp_path, settings, rows, rows))
    assert run.results["rouge_prompts"] == 4 and run.results["rougeL"] > 0.95 and run.results["rouge1"] > 0.95
    samples = [json.loads(line) for line in (run.path / SAMPLES).read_text().splitlines()]
    assert len({sample["prompt"] for sample in samples}) == 4
    assert all(sample["gold"] == ends[sample["prompt"]] for sample in samples)
    found = rouge([sample["completion"] for sample in samples], [sample["gold"] for sample in samples])
    assert {name: run.results[name] for name in found} == found
    assert f"ROUGE-1/2/L {found['rouge1']:.3f}/" in line and line.endswith("on 4 prompts")


@pytest.mark.slow
def test_completions_for_rouge_are_as_long_as_the_longest_reference(tmp_path, policy_folder):
    """An untrained model goes on until it is cut off: after the longest reference and its EOS, or after max_length."""
    for max_length, longest in ((24, 7), (3, 3)):
        settings = SFT.format(policy_folder, "0.0").replace("sft: {", "sft: {rouge_prompts: 16, ")
        own = (f"sft.trainer.max_length={max_length}", f"name=up_to_{longest}")
        recipe = recipe_of(tmp_path, settings, SUMMARIES, SUMMARIES, *own)
        run, _ = run_stage(sft, "sft", recipe)
        samples = [json.loads(line) for line in (run.path / SAMPLES).read_text().splitlines()]
        assert max(len(sample["completion"].split()) for sample in samples) == longest
        assert run.results["rougeL"] < 0.5


def test_rouge_needs_completions_and_room(tmp_path, policy_folder):
    settings = SFT.format(policy_folder, "0.0").replace("sft: {", "sft: {rouge_prompts: 4, ")
    with pytest.raises(RecipeError, match=r"sft\.rouge_prompts: .* it has: text, label\. .* sft\.rouge_prompts=0"):
        sft.main(Run(recipe_of(tmp_path, settings, REVIEWS, REVIEWS), "sft"))
    long = [{"prompt": prompt, "completion": " was good ."} for prompt in ("the film " * 31, "it")]
    with pytest.raises(RecipeError, match=r"sft\.rouge_prompts: .* prompt has 62 tokens .* 4, more than .* 64"):
        sft.main(Run(recipe_of(tmp_path, settings, SUMMARIES, long), "sft"))


def test_shared_out_keeps_order(monkeypatch):
    """Two ranks, one after the other; what they gather is the second rank's first."""
    rows, gathered = list(range(7)), []

    class Rank:
        num_processes = 2

        def __init__(self, index):
            self.process_index = index

    def gather(mine):
        gathered[:0] = mine
        return list(gathered)

    monkeypatch.setattr("accelerate.utils.gather_object", gather)
    shares = []
    for rank in (0, 1):
        done = shared_out(Rank(rank), rows, lambda part: shares.append(part) or [10 * row for row in part])
    assert shares == [[0, 2, 4, 6], [1, 3, 5]] and done == [10 * row for row in rows]

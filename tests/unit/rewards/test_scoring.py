"""A reward model reads texts in the format of its training: every layout, compared with TRL's RewardTrainer."""

import json
import logging
import random

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.rewards import try_out as score
from rlhf_recipes.rewards.checked import RewardError
from rlhf_recipes.rewards.from_trl import as_reward_func
from rlhf_recipes.rewards.functions import reward_model
from rlhf_recipes.rewards.reader import RewardModelReader
from rlhf_recipes.rewards.scoring import trained_scoring
from rlhf_recipes.runs.files import SCORING
from support.processes import cli
from support.texts import WORDS, write_jsonl
from support.tiny_models import causal_lm, save_pair, word_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

PROMPTS = ["the film", "it", "the plot was very bad", "a movie"]
CHOSEN = [" was good .", " was great and fun and very good", " .", " i liked"]
REJECTED = [" was bad", " was awful and very dull .", " and very awful !", " i hated it"]


def chats(texts: list[str], role: str) -> list:
    return [[{"role": role, "content": text.strip()}] for text in texts]


def sequence_classifier(folder, architecture: str = "gpt2", seed: int = 5, **special):
    """A random reward model, with a head large enough that scores at different tokens are far apart."""
    tokenizer = word_tokenizer(**special)
    tokenizer.add_tokens(["<end>"])
    save_pair(folder / "lm", causal_lm(tokenizer, architecture), tokenizer)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "lm", num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    return model, tokenizer


def reward_trainer(model, tokenizer, rows: dict, folder, **more) -> RewardTrainer:
    args = RewardConfig(
        output_dir=str(folder / "out"), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], **more
    )
    return RewardTrainer(model=model, args=args, train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)


def as_trained(trainer: RewardTrainer) -> list[float]:
    """The model's outputs for the trainer's own batches: first the chosen texts, then the rejected ones."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        return trainer.model.eval()(**batch).logits[:, 0].tolist()


def stored(trainer: RewardTrainer, folder, chat: bool = False, center: float = 0.0):
    save_pair(folder, trainer.model, trainer.processing_class)
    trained_scoring(trainer, chat, center).write(folder)
    return folder


def scores(function, prompts, completions, finished=None) -> list[float]:
    finished = [True] * len(prompts) if finished is None else finished
    return function(prompts=prompts, completions=completions, finished=finished, completion_ids=[[1]] * len(prompts))


def change(path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(params=["gpt2", "gpt_neox", "llama"])
def architecture(request):
    return request.param


@pytest.fixture(params=["pad", "pad == eos"])
def special(request):
    return {"pad_token": "<eos>"} if request.param == "pad == eos" else {}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_file", [True, False])
def test_finished_texts_are_read_as_in_training(architecture, special, side, with_file, tmp_path):
    """All layouts that a tokenizer's files can have; unequal lengths, so that every batch is padded."""
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    trainer = reward_trainer(*sequence_classifier(tmp_path, architecture, **special), rows, tmp_path)
    folder = stored(trainer, tmp_path / "rm")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, truncation_side=side)
    tokenizer.save_pretrained(folder)
    if not with_file:
        (folder / SCORING).unlink()
    found = scores(reward_model(str(folder), batch_size=3), PROMPTS * 2, CHOSEN + REJECTED)
    expected = as_trained(trainer)
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1  # and they are not all the same


def test_the_score_is_the_one_at_the_last_token_that_does_not_pad(architecture, special, tmp_path):
    """By hand: hidden states of the unpadded text, one score for every token."""
    model, tokenizer = sequence_classifier(tmp_path, architecture, **special)
    function = as_reward_func(model, tokenizer)
    text = "the film was good ."
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    with torch.no_grad():
        every_token = model.score(model.base_model(torch.tensor([ids])).last_hidden_state)[0, :, 0]
    finished, cut_off = scores(function, ["the film"] * 2, [" was good ."] * 2, [True, False])
    hidden = tokenizer.pad_token == tokenizer.eos_token  # then the EOS looks like padding, in training as well
    assert finished == pytest.approx(every_token[-2 if hidden else -1].item(), abs=1e-5)
    assert cut_off == pytest.approx(every_token[-2].item(), abs=1e-5)


def test_a_score_does_not_depend_on_order_or_batch(architecture, special, tmp_path):
    model, tokenizer = sequence_classifier(tmp_path, architecture, **special)
    dice = random.Random(0)
    texts = ["".join(f" {dice.choice(WORDS)}" for _ in range(dice.randint(1, 30))) for _ in range(24)]
    ends = [dice.random() < 0.5 for _ in texts]
    alone = [
        scores(as_reward_func(model, tokenizer), ["the"], [text], [end])[0]
        for text, end in zip(texts, ends, strict=True)
    ]
    for batch_size in (1, 5, 64):
        order = dice.sample(range(24), 24)
        together = scores(
            RewardModelReader("", model, tokenizer, batch_size, None),
            ["the"] * 24,
            [texts[i] for i in order],
            [ends[i] for i in order],
        )
        assert together == pytest.approx([alone[i] for i in order], abs=1e-5)


def test_finished_chats_are_closed(architecture, special, tmp_path):
    model, tokenizer = sequence_classifier(tmp_path, architecture, **special)
    tokenizer.chat_template = CHAT
    prompts = chats(PROMPTS, "user")
    rows = {"prompt": prompts, "chosen": chats(CHOSEN, "assistant"), "rejected": chats(REJECTED, "assistant")}
    trainer = reward_trainer(model, tokenizer, rows, tmp_path)
    folder = stored(trainer, tmp_path / "rm", chat=True)
    function = reward_model(str(folder))
    completions = rows["chosen"] + rows["rejected"]
    assert scores(function, prompts * 2, completions) == pytest.approx(as_trained(trainer), abs=1e-5)

    text = "<user> the film <end>\n<assistant> was good ."  # no <end>: the turn is open
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = trainer.model(input_ids=ids).logits.item()
    assert scores(function, prompts[:1], completions[:1], [False])[0] == pytest.approx(expected, abs=1e-5)
    assert abs(scores(function, prompts[:1], completions[:1], [True])[0] - expected) > 1e-3


def test_an_empty_completion_that_was_cut_off_is_an_open_turn(tmp_path):
    model, tokenizer = sequence_classifier(tmp_path)
    tokenizer.chat_template = CHAT
    found = scores(as_reward_func(model, tokenizer), chats(["it"], "user"), chats([""], "assistant"), [False])
    with torch.no_grad():
        expected = model(**tokenizer("<user> it <end>\n<assistant>", return_tensors="pt")).logits.item()
    assert found[0] == pytest.approx(expected, abs=1e-5)


def test_a_bos_is_there_once_in_plain_texts_and_in_chats(tmp_path):
    """TRL lets the tokenizer add its BOS to plain texts, and the template to chats."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = sequence_classifier(tmp_path, "llama")
    tokenizer.bos_token = "<unk>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    trainer = reward_trainer(model, tokenizer, rows, tmp_path)
    assert trainer.train_dataset[0]["chosen_ids"][0] == tokenizer.bos_token_id
    found = scores(as_reward_func(model, tokenizer), PROMPTS * 2, CHOSEN + REJECTED)
    assert found == pytest.approx(as_trained(trainer), abs=1e-5)
    rows = {"chosen": chats(CHOSEN, "user"), "rejected": chats(REJECTED, "user")}
    trainer = reward_trainer(model, tokenizer, rows, tmp_path)
    found = scores(as_reward_func(model, tokenizer), [[]] * 8, rows["chosen"] + rows["rejected"])
    assert found == pytest.approx(as_trained(trainer), abs=1e-5)


def test_an_eos_that_the_tokenizer_adds_by_itself_does_not_end_a_cut_off_text(tmp_path):
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = sequence_classifier(tmp_path)
    bare = tokenizer("it was bad", return_tensors="pt")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    trainer = reward_trainer(model, tokenizer, {"chosen": ["it was bad"], "rejected": ["it"]}, tmp_path)
    finished, cut_off = scores(as_reward_func(model, tokenizer), ["it"] * 2, [" was bad"] * 2, [True, False])
    assert finished == pytest.approx(as_trained(trainer)[0], abs=1e-5)
    with torch.no_grad():
        assert cut_off == pytest.approx(model(**bare).logits.item(), abs=1e-5)


def test_an_encoder_reads_what_it_was_trained_on(classifier_folder, tmp_path):
    """DistilBERT has no EOS. Stage reward uses the separator as EOS, so a finished text has two separators."""
    from rlhf_recipes.data.tokenizer import load_tokenizer
    from rlhf_recipes.recipe.load import load_recipe

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        classifier_folder, num_labels=1, ignore_mismatched_sizes=True
    )
    torch.nn.init.normal_(model.classifier.weight)
    tokenizer = load_tokenizer(load_recipe("imdb_tiny"), "reward.model", str(classifier_folder), classifier=True)
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    trainer = reward_trainer(model, tokenizer, rows, tmp_path)
    folder = stored(trainer, tmp_path / "rm")
    function = reward_model(str(folder))
    assert scores(function, PROMPTS * 2, CHOSEN + REJECTED) == pytest.approx(as_trained(trainer), abs=1e-5)
    with torch.no_grad():
        one_separator = trainer.model(**tokenizer("the film was good .", return_tensors="pt")).logits.item()
    assert scores(function, ["the film"], [" was good ."], [False])[0] == pytest.approx(one_separator, abs=1e-5)
    # A classifier from elsewhere, without a file and without an EOS, gets its own [CLS] and [SEP] only.
    plain = save_pair(tmp_path / "plain", trainer.model, AutoTokenizer.from_pretrained(classifier_folder))
    assert scores(reward_model(str(plain)), ["the film"], [" was good ."])[0] == pytest.approx(one_separator, abs=1e-5)


@pytest.fixture
def trained(tmp_path):
    """A reward model of texts up to 16 tokens, with its file."""
    model, tokenizer = sequence_classifier(tmp_path)
    trainer = reward_trainer(model, tokenizer, {"chosen": CHOSEN, "rejected": REJECTED}, tmp_path, max_length=16)
    return stored(trainer, tmp_path / "rm", center=0.25), trainer


def test_the_file_holds_the_format(trained):
    folder, _ = trained
    assert json.loads((folder / SCORING).read_text()) == {
        "format": "text",
        "append_eos": True,
        "eos_token": "<eos>",
        "eos_token_id": 1,
        "pad_token": "<pad>",
        "pad_token_id": 0,
        "padding_side": "right",
        "max_length": 16,
        "chat_template_sha256": None,
        "center": 0.25,
    }


def test_the_log_says_which_format_is_used(trained, caplog):
    folder, _ = trained
    with caplog.at_level(logging.INFO, "rlhf_recipes.rewards.reader"):
        reward_model(str(folder))
        (folder / SCORING).unlink()
        reward_model(str(folder))
    ours = [record for record in caplog.records if record.name == "rlhf_recipes.rewards.reader"]
    with_file, without = (record.getMessage() for record in ours)
    assert "scoring.json says: plain texts, EOS '<eos>' (1) at the end of finished ones" in with_file
    assert "padded on the right with '<pad>' (0)" in with_file and "16 tokens at most; minus 0.25." in with_file
    assert "no scoring.json, so read as TRL's RewardTrainer trains" in without and "64 tokens at most." in without


def test_the_center_comes_from_the_file_or_else_from_the_configuration(trained):
    folder, trainer = trained
    raw = as_trained(trainer)[: len(CHOSEN)]
    found = scores(reward_model(str(folder)), [""] * 4, CHOSEN)
    assert found == pytest.approx([value - 0.25 for value in raw], abs=1e-5)
    (folder / SCORING).unlink()
    change(folder / "config.json", score_center=0.5)  # earlier versions wrote this instead of the file
    found = scores(reward_model(str(folder)), [""] * 4, CHOSEN)
    assert found == pytest.approx([value - 0.5 for value in raw], abs=1e-5)


def test_the_pad_token_of_the_training_replaces_that_of_the_tokenizer(trained):
    folder, _ = trained
    before = scores(reward_model(str(folder)), [""] * 4, CHOSEN)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    assert scores(reward_model(str(folder)), [""] * 4, CHOSEN) == pytest.approx(before, abs=1e-6)
    change(folder / "config.json", pad_token_id=None)
    assert scores(reward_model(str(folder)), [""] * 4, CHOSEN) == pytest.approx(before, abs=1e-6)


def test_without_a_file_the_pad_token_of_the_model_is_used(trained):
    folder, _ = trained
    (folder / SCORING).unlink()
    before = scores(reward_model(str(folder)), [""] * 4, CHOSEN)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    assert scores(reward_model(str(folder)), [""] * 4, CHOSEN) == pytest.approx(before, abs=1e-6)


def test_longer_texts_lose_their_beginning_and_keep_their_end(trained, caplog):
    folder, trainer = trained
    long = " ".join(WORDS[i % 8] for i in range(40))
    function = reward_model(str(folder))
    found = scores(function, [long], [" was bad"])[0]
    assert "1 of 1 texts lose their beginning: they are longer than the 16 tokens" in caplog.text
    ids = (trainer.processing_class(long + " was bad")["input_ids"] + [1])[-16:]
    with torch.no_grad():
        expected = trainer.model(input_ids=torch.tensor([ids])).logits.item() - 0.25
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"eos_token": "</s>"}, "its eos token was '</s>' (1), and the tokenizer does not have it"),
        ({"eos_token_id": 7}, "its eos token was '<eos>' (7), and the tokenizer has it as 1"),
        ({"pad_token_id": 9}, "its pad token was '<pad>' (9), and the tokenizer has it as 0"),
        ({"format": "chat", "chat_template_sha256": "0"}, "trained with a chat template, and the tokenizer has none"),
        ({"padding_side": "left"}, "it was padded on the left"),
        ({"pad_token_id": "zero"}, "damaged (pad_token_id: "),
        ({"surprise": 1}, "damaged (surprise: "),
    ],
)
def test_a_format_that_does_not_fit_the_tokenizer_is_refused(trained, values, expected):
    folder, _ = trained
    change(folder / SCORING, **values)
    with pytest.raises(RecipeError) as refused:
        reward_model(str(folder))
    assert expected in str(refused.value)


def test_another_chat_template_is_refused(tmp_path):
    model, tokenizer = sequence_classifier(tmp_path)
    tokenizer.chat_template = CHAT
    rows = {"chosen": chats(CHOSEN, "assistant"), "rejected": chats(REJECTED, "assistant")}
    folder = stored(reward_trainer(model, tokenizer, rows, tmp_path), tmp_path / "rm", chat=True)
    reward_model(str(folder))
    tokenizer.chat_template = CHAT.replace("<end>", "")
    tokenizer.save_pretrained(folder)
    with pytest.raises(RecipeError, match="trained with a chat template, and the tokenizer has another one"):
        reward_model(str(folder))


def test_max_length_may_not_cut_what_training_read_whole(trained):
    folder, _ = trained
    assert reward_model(str(folder), max_length=20)
    with pytest.raises(RecipeError, match="max_length is 8, but .* was trained on whole texts of up to 16 tokens"):
        reward_model(str(folder), max_length=8)
    with pytest.raises(RecipeError, match="max_length is 100, but .* reads 64 tokens at most"):
        reward_model(str(folder), max_length=100)


def test_prompts_of_another_kind_than_in_training_are_refused(trained):
    function = reward_model(str(trained[0]))
    with pytest.raises(RewardError, match=r"was trained on plain texts \(scoring.json\), and is given chat messages"):
        scores(function, chats(["it"], "user"), chats(["bad"], "assistant"))
    with pytest.raises(RewardError, match="empty text"):
        scores(function, [""], [""], [False])


def test_a_model_without_a_trained_head_is_no_reward_model(tmp_path):
    sequence_classifier(tmp_path)
    with pytest.raises(RecipeError, match="no trained classifier: it has no score.weight"):
        reward_model(str(tmp_path / "lm"))


def test_everything_that_trl_takes_becomes_a_reward_function(trained, caplog):
    """A folder, an instance, and callables of every kind; each has TRL's name for it."""
    import functools

    from trl.trainer.utils import get_callable_name

    folder, trainer = trained
    expected = scores(reward_model(str(folder)), [""] * 4, CHOSEN)
    by_folder = as_reward_func(str(folder))
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    for function in (by_folder, as_reward_func(loaded), as_reward_func(loaded, trainer.processing_class)):
        assert get_callable_name(function) == "rm" and scores(function, [""] * 4, CHOSEN) == pytest.approx(
            expected, abs=1e-6
        )

    class Judge:
        def __call__(self, completions, **columns):
            return [1.0] * len(completions)

    def named(completions, scale=1.0, **columns):
        return [scale] * len(completions)

    for function in (named, Judge(), functools.partial(named, scale=1.0), lambda completions, **columns: [1.0]):
        made = as_reward_func(function)
        assert get_callable_name(made) == get_callable_name(function) and scores(made, ["it"], ["bad"]) == [1.0]
    assert as_reward_func(named) is named
    with pytest.raises(RecipeError, match="3 is no reward function"):
        as_reward_func(3)
    model, tokenizer = sequence_classifier(folder.parent)
    model.config._name_or_path = ""
    with pytest.raises(RecipeError, match="pass its tokenizer too"):
        as_reward_func(model)
    assert get_callable_name(as_reward_func(model, tokenizer)) == "GPT2ForSequenceClassification"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "pad == eos", "chat"])
def test_stage_reward_and_reward_model_agree(kind, tmp_path, policy_folder):
    """Stage reward trains, writes its file, and `reward_model` reads the same numbers as TRL's trainer."""
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(PROMPTS, CHOSEN, REJECTED, strict=True)] * 6
    if kind == "pad == eos":
        tokenizer.pad_token = tokenizer.eos_token
    if kind == "chat":
        tokenizer.chat_template = CHAT
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows = [{name: chats([text], roles[name])[0] for name, text in row.items()} for row in rows]
    base = tmp_path / "base"
    save_pair(base, causal_lm(tokenizer), tokenizer)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    (tmp_path / "r.yaml").write_text(
        f"name: r\ndescription: d\ndata: {{path: {data}, eval_fraction: 0.2}}\nreward_funcs: [{{name: length}}]\n"
        f"reward: {{model: {base}, trainer: {{max_steps: 4, max_length: 40, learning_rate: 1e-2}}}}\n"
    )
    done = cli("reward", "r.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "r" / "reward"
    written = json.loads((folder / SCORING).read_text())
    assert written["format"] == ("chat" if kind == "chat" else "text") and written["max_length"] == 40
    assert written["center"] == json.loads((folder / "manifest.json").read_text())["results"]["score_center"] != 0

    columns = {name: [row[name] for row in rows[:4]] for name in rows[0]}
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    trainer = reward_trainer(loaded, AutoTokenizer.from_pretrained(folder), columns, tmp_path)
    expected = [value - written["center"] for value in as_trained(trainer)]
    found = scores(reward_model(str(folder)), columns["prompt"] * 2, columns["chosen"] + columns["rejected"])
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_score_command_takes_chat_messages(tmp_path, policy_folder):
    (tmp_path / "r.yaml").write_text(
        "name: r\ndescription: d\ndata: {path: none.jsonl}\nreward_funcs: [{name: length}]\n"
        f"rloo: {{policy: {policy_folder}}}\n"
    )
    write_jsonl(tmp_path / "none.jsonl", [])
    chat = {"prompt": chats(["it"], "user")[0], "completion": chats(["a b c"], "assistant")[0]}
    done = cli("score", "r.yaml", "--file", str(write_jsonl(tmp_path / "chats.jsonl", [chat])), cwd=tmp_path)
    assert done.returncode == 0 and "-3.000" in done.stdout, done.stderr
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [chat | {"prompt": "it"}])
    done = cli("score", "r.yaml", "--file", str(mixed), cwd=tmp_path)
    assert done.returncode == 2 and "line 1: prompt and completion must both be texts" in done.stderr


def test_lines_of_a_file_end_with_line_breaks_only(tmp_path):
    line = json.dumps({"completion": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "texts.jsonl").write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    assert score._read(tmp_path / "texts.jsonl") == [("", "a\u2028b\x85c")] * 2
    (tmp_path / "texts.txt").write_bytes(b"one\r\ntwo")
    assert score._read(tmp_path / "texts.txt") == [("", "one"), ("", "two")]

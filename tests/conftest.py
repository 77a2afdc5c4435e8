"""Tiny models, tokenizers and data, made here: every test runs without network."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

# Two test processes on two cores: with more threads than cores, OpenMP's threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# A shell starts what runs in the background deaf to Ctrl-C, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

WORDS = "the film was great bad good awful fun dull i liked hated it a movie plot and acting very not . !".split()

REVIEWS = [
    {"text": f"the film was {word} and {end} .", "label": label}
    for label, words, ends in (
        (1, ("great", "good", "fun", "very good", "very fun"), ("i liked it", "the plot was good", "a fun movie")),
        (0, ("bad", "awful", "dull", "very bad", "very dull"), ("i hated it", "the plot was bad", "a dull movie")),
    )
    for word in words
    for end in ends
]

HELD_OUT_REVIEWS = [row | {"text": row["text"].replace("the film", "a movie")} for row in REVIEWS]
"""As many others: held-out pairs are made of texts that no training row has."""


TRAINERS = [
    "trl.trainer.sft_trainer",
    "trl.trainer.reward_trainer",
    "rlhf_recipes.trainers.rloo",
    "rlhf_recipes.trainers.ppo",
    "rlhf_recipes.runs.callbacks",
    "rlhf_recipes.runs.checkpoints",
]
"""What takes seconds to import: a server does it once and forks the processes of tests."""

TIMES = ("seconds", "runtime", "per_second")
"""In names of metrics that differ from run to run."""


LONGEST = ("test_readme.py", "test_pipeline.py", "test_accelerate_configs.py", "test_benchmarks.py", "test_duel.py")
"""Files that take minutes are begun first, or one process would wait for the other's last file."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def environment():
    """A stage that runs in the tests' own process sets variables for trackers; the next test's processes get none."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def log():
    """What runs in the tests' own process sends all logging to places of ours; the next test's goes where it went."""
    loggers = [logging.getLogger(name) for name in (None, "transformers", "datasets")]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]
    show = warnings.showwarning
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers
    warnings.showwarning = show


@pytest.fixture(scope="session")
def reviews() -> list[dict]:
    """30 short reviews with labels, 15 of each."""
    return REVIEWS


@pytest.fixture
def reviews_file(tmp_path) -> Path:
    """The reviews as a jsonl file."""
    return write_jsonl(tmp_path / "reviews.jsonl", REVIEWS)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def word_tokenizer(**special):
    """A word-level tokenizer: its decoder drops the blank before a completion."""
    from rlhf_recipes.data.tokenizer import make_tokenizer
    from rlhf_recipes.recipe.schema import Scratch

    tokenizer = make_tokenizer(Scratch(tokenizer="word", vocabulary=200), [" ".join(WORDS)])
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


def bpe_tokenizer():
    """A byte-level BPE tokenizer with a pad token of its own."""
    from rlhf_recipes.data.tokenizer import make_tokenizer
    from rlhf_recipes.recipe.schema import Scratch

    return make_tokenizer(Scratch(tokenizer="bpe", vocabulary=320), [row["text"] for row in REVIEWS])


def causal_lm(tokenizer, architecture: str = "gpt2", seed: int = 0, **config):
    """A random causal language model with two small layers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64},
        "llama": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "gpt_neox": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 64,
        },
        "mixtral": {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "max_position_embeddings": 64,
        },
    }[architecture]
    torch.manual_seed(seed)
    settings = (
        sizes
        | {
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": tokenizer.pad_token_id,
        }
        | config
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))


def save_pair(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def put_into_cache(cache: Path, name: str, folder: Path, *refs: str, kind: str = "model") -> str:
    """Lay a folder into huggingface_hub's cache as it lays out a download of a commit; returns the commit."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    commit = hashlib.sha1(b"".join(files.values())).hexdigest()
    root = cache / f"{kind}s--{name.replace('/', '--')}"
    for part in ("blobs", f"snapshots/{commit}"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (root / "snapshots" / commit / file).symlink_to(os.path.relpath(blob, root / "snapshots" / commit))
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return commit


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub, which is off."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """A random GPT-2 over words, saved."""
    tokenizer = word_tokenizer()
    return save_pair(tmp_path_factory.mktemp("policy"), causal_lm(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def bpe_policy_folder(tmp_path_factory) -> Path:
    """A random GPT-2 with byte-level BPE, pad == EOS and EOS == BOS, as the Hub's GPT-2 family has it."""
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.bos_token = tokenizer.eos_token
    return save_pair(tmp_path_factory.mktemp("bpe_policy"), causal_lm(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory) -> Path:
    """A random DistilBERT with the labels NEGATIVE and POSITIVE and a WordPiece tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    inner = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(1)
    config = DistilBertConfig(
        vocab_size=len(names),
        dim=32,
        n_layers=2,
        n_heads=2,
        hidden_dim=64,
        num_labels=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
        label2id={"NEGATIVE": 0, "POSITIVE": 1},
    )
    return save_pair(tmp_path_factory.mktemp("classifier"), DistilBertForSequenceClassification(config), tokenizer)


def run_python(*arguments: str, cwd: Path, timeout: int = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run this Python as a process of its own, in the tests' environment."""
    variables = os.environ | {"COLUMNS": "160"} | environment
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def cli(*arguments: str, cwd: Path, **more) -> subprocess.CompletedProcess:
    """Run `rlhf-recipes` as a user does."""
    return run_python("-m", "rlhf_recipes.cli", *arguments, cwd=cwd, **more)

"""Tiny models, tokenizers and data, made here: every test runs without network."""

import fcntl
import gc
import logging
import os
import signal
import sys
import warnings
from pathlib import Path

import pytest

from support.finished_runs import FEW
from support.fork_server import Server, install, uninstall
from support.places import TESTS
from support.processes import cli
from support.texts import REVIEWS, WORDS, write_jsonl
from support.tiny_models import bpe_tokenizer, causal_lm, save_pair, word_tokenizer

# Two test processes on two cores: with more threads than cores, OpenMP's threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Processes that tests start find `support` too.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))

# A shell starts what runs in the background deaf to Ctrl-C, and so would be every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOWEST = ("end_to_end", "nightly", "stages", "faults")
"""Folders whose tests take longest begin first, so that neither process waits for the other's last long file."""


def pytest_collection_modifyitems(items):
    for item in items:
        if "nightly" in item.path.parts and item.get_closest_marker("slow"):
            item.add_marker("nightly")
    gc.collect()
    gc.freeze()  # else the collector goes through all that the libraries have made, in every test
    items.sort(key=lambda item: not set(SLOWEST) & set(item.path.parts))


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Forks the processes that tests start; a test marked `cold`, or `COLD=1`, starts them as a user does."""
    server = Server()
    if "COLD" not in os.environ:
        install(server.ask)
    yield server
    uninstall()
    server.stop()


@pytest.fixture(autouse=True)
def cold(request, fork_server):
    """Processes of tests marked `cold` load their libraries themselves."""
    is_cold = request.node.get_closest_marker("cold") is not None or "COLD" in os.environ
    if is_cold:
        uninstall()
    yield
    if is_cold and "COLD" not in os.environ:
        install(fork_server.ask)


@pytest.fixture(autouse=True)
def environment():
    """A stage in the tests' own process sets variables for trackers and adds folders to look for modules in; the next
    test's processes get none."""
    before, path = dict(os.environ), list(sys.path)
    yield
    sys.path[:] = path
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


@pytest.fixture(scope="session")
def few_steps(tmp_path_factory) -> Path:
    """A folder in which `run imdb_tiny` has been called in few steps, with what it said in `stdout` and `stderr`.

    All test processes share it: a test that changes anything in it copies it first.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "few_steps"
    with open(shared / "few_steps.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "stderr").exists():
            folder.mkdir()
            done = cli("run", "imdb_tiny", *FEW, cwd=folder, timeout=600)
            assert done.returncode == 0, done.stderr
            (folder / "stdout").write_text(done.stdout)
            (folder / "stderr").write_text(done.stderr)
    return folder


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

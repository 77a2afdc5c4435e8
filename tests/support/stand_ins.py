"""Local stand-ins for what recipes load from the Hub: tiny random models of the same classes, with tokenizers of the same
kinds, and a few rows with the same columns.

A recipe is run as it is; overrides put the stand-ins in the place of ids, and make sizes small.
"""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    PreTrainedTokenizerFast,
)

from rlhf_recipes.recipe.schema import Recipe
from rlhf_recipes.runs.fetched import FETCHED
from rlhf_recipes.runs.inputs import hub_references
from support.places import SAMPLES
from support.tiny_models import bpe_tokenizer, causal_lm, save_pair

DATA = {
    "stanfordnlp/imdb": ("imdb", "text"),
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered": ("summarize_from_feedback_tldr_3_filtered", "post"),
    "openai/summarize_from_feedback": ("summarize_from_feedback", "info.post"),
    "Dahoas/synthetic-instruct-gptj-pairwise": ("synthetic-instruct-gptj-pairwise", "prompt"),
}
"""Hub id -> folder of its sample, and the column that distinguishes rows."""

ROWS = 60
"""Rows of each split of a stand-in: enough for a rollout and a held-out part."""


def texts() -> list[str]:
    return [line for file in SAMPLES.rglob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]


def gpt2(folder: Path) -> Path:
    """GPT-2's family: byte-level BPE, one special token for BOS and EOS, none for padding."""
    tokenizer = bpe_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.pad_token = None
    model = causal_lm(tokenizer, "gpt2", n_embd=64, n_positions=1024, pad_token_id=None)
    return save_pair(folder, model, tokenizer)


def pythia(folder: Path) -> Path:
    """GPT-NeoX: byte-level BPE without a pad token, and more rows of embeddings than tokens."""
    tokenizer = bpe_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.pad_token = None
    sizes = {"hidden_size": 64, "max_position_embeddings": 2048, "pad_token_id": None}
    model = causal_lm(tokenizer, "gpt_neox", vocab_size=len(tokenizer) + 27, **sizes)
    return save_pair(folder, model, tokenizer)


def llama(folder: Path) -> Path:
    """Llama: every text begins with BOS; no pad token, and no row of embeddings to spare."""
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    tokenizer.pad_token = None
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A {bos[0]} $B", [bos]),
        ]
    )
    sizes = {"hidden_size": 64, "max_position_embeddings": 2048, "pad_token_id": None}
    model = causal_lm(tokenizer, "llama", bos_token_id=bos[1], **sizes | {"num_key_value_heads": 1})
    return save_pair(folder, model, tokenizer)


def smollm2(folder: Path) -> Path:
    """SmolLM2-Instruct: one token for padding and EOS, and a chat template that adds a system message where there is none."""
    tokenizer = bpe_tokenizer()
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    tokenizer.add_special_tokens(names | {"pad_token": "<|im_end|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = {"hidden_size": 64, "max_position_embeddings": 2048, "num_key_value_heads": 1, "bos_token_id": None}
    return save_pair(folder, causal_lm(tokenizer, "llama", **sizes), tokenizer)


CHAT_TEMPLATE = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
"""SmolLM2-Instruct's own."""


def minilm(folder: Path) -> Path:
    """MiniLM, an encoder of BERT's architecture, without a head."""
    tokenizer = wordpiece()
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return save_pair(folder, BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)), tokenizer)


def wordpiece() -> PreTrainedTokenizerFast:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.train_from_iterator(
        texts(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    )
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), names, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **special)


def distilbert(folder: Path, classifier: bool = False) -> Path:
    """DistilBERT with WordPiece: without a head, or with the labels of a sentiment classifier."""
    tokenizer = wordpiece()
    torch.manual_seed(1)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=64, n_layers=2, n_heads=2, hidden_dim=64)
    if classifier:
        config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}
    return save_pair(
        folder, (DistilBertForSequenceClassification if classifier else DistilBertModel)(config), tokenizer
    )


def deberta(folder: Path) -> Path:
    """DeBERTa v3: SentencePiece (a file `spm.model`), relative positions."""
    import sentencepiece

    folder.mkdir(parents=True)
    model = io.BytesIO()
    special = {"pad": "[PAD]", "bos": "[CLS]", "eos": "[SEP]", "unk": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts()),
        model_writer=model,
        vocab_size=300,
        minloglevel=2,
        **{f"{name}_piece": token for name, token in special.items()},
        **{f"{name}_id": i for i, name in enumerate(special)},
    )
    (folder / "spm.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))
    torch.manual_seed(1)
    config = DebertaV2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)) + 8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
        position_biased_input=False,
    )
    DebertaV2Model(config).save_pretrained(folder)
    return folder


MODELS = {
    "openai-community/gpt2": gpt2,
    "openai-community/gpt2-medium": gpt2,
    "openai-community/gpt2-large": gpt2,
    "distilbert/distilgpt2": gpt2,
    "lvwerra/gpt2-imdb": gpt2,
    "EleutherAI/pythia-410m-deduped": pythia,
    "EleutherAI/pythia-1b-deduped": pythia,
    "EleutherAI/pythia-2.8b-deduped": pythia,
    "EleutherAI/pythia-6.9b-deduped": pythia,
    "meta-llama/Llama-3.2-1B": llama,
    "distilbert/distilbert-base-cased": distilbert,
    "distilbert/distilbert-base-uncased": distilbert,
    "lvwerra/distilbert-imdb": lambda folder: distilbert(folder, classifier=True),
    "microsoft/deberta-v3-base": deberta,
}
"""Hub id -> the function that makes its stand-in."""

FETCHED_MODELS = {"smollm2": smollm2, "minilm": minilm}
"""Name of a fetched model -> the function that makes its stand-in."""
assert FETCHED_MODELS.keys() == FETCHED.keys()


def data(folder: Path, name: str) -> Path:
    """The sample of a Hub data set with repeated rows; each repetition has its own word."""
    sample, column = DATA[name]
    folder.mkdir(parents=True)
    for file in (SAMPLES / sample).glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        with open(folder / file.name, "w", encoding="utf-8") as out:
            for i in range(ROWS):
                row = json.loads(json.dumps(rows[i % len(rows)]))
                *path, last = column.split(".")
                inner = row
                for part in path:
                    inner = inner[part]
                if inner[last] is not None:
                    inner[last] = f"Case {i}: {inner[last]}"
                out.write(json.dumps(row) + "\n")
    return folder


class Shelf:
    """Makes each stand-in once, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.place = cache(self._place)

    def _place(self, name: str, kind: str) -> Path:
        folder = self.folder / kind / name.replace("/", "--")
        if not folder.exists():
            data(folder, name) if kind == "dataset" else MODELS[name](folder)
        return folder

    def fetched(self) -> Path:
        """The cache of `rlhf-recipes fetch`, with all of its models."""
        cache = self.folder / "fetched"
        for name, make in FETCHED_MODELS.items():
            if not (cache / name).exists():
                make(cache / name)
        return cache

    def overrides(self, recipe: Recipe) -> list[str]:
        """Replace every Hub id that a stage of a recipe loads by its stand-in."""
        found = {}
        for stage in recipe.stages():
            found |= hub_references(recipe, stage)
        made = []
        for key, (reference, kind) in found.items():
            made.append(f"{key}={self.place(reference, kind)}")
            if kind == "dataset":
                section = key.removesuffix(".path")
                made += [f"{section}.config=null", f"{section}.revision=null"]
        return made


def micro_batches(stage: str, section: Any) -> list[str]:
    """Micro-batches of 4; two for each step if the recipe has several, and the recipe's number of steps for each rollout."""
    made = [f"{stage}.trainer.per_device_train_batch_size=4"]
    if section.global_batch_size is None:
        accumulation = min(2, section.trainer.get("gradient_accumulation_steps", 1))
        return [*made, f"{stage}.trainer.gradient_accumulation_steps={accumulation}"]
    made.append(f"{stage}.global_batch_size=8")
    if rollout := section.trainer.get("generation_batch_size"):
        made.append(f"{stage}.trainer.generation_batch_size={8 * rollout // section.global_batch_size}")
    return made


def small(recipe: Recipe) -> list[str]:
    """Two steps or two rollouts of every stage; batches keep their structure."""
    made = ["episodes=null"] if recipe.episodes is not None else []
    sections = {"data": recipe.data} | ({"reward.data": recipe.reward.data} if recipe.reward else {})
    made += [f"{key}.max_rows=1500" for key, data in sections.items() if data and data.path.startswith("package:")]
    for stage in ("sft", "reward"):
        section = getattr(recipe, stage)
        if section is not None:
            made += [f"{stage}.trainer.max_steps=2", *micro_batches(stage, section)]
    for stage in ("ppo", "rloo"):
        section = getattr(recipe, stage)
        if section is None:
            continue
        trainer = section.trainer
        per_rollout = (
            trainer.get("generation_batch_size", section.global_batch_size or 1)
            // (section.global_batch_size or 1)
            * trainer.get("steps_per_generation", 1)
        )
        steps = 2 * per_rollout * trainer.get("num_iterations", 1)
        made += [
            *micro_batches(stage, section),
            f"{stage}.trainer.max_completion_length=8",
            f"{stage}.trainer.max_steps={steps}",
        ]
    if recipe.sft is not None and recipe.sft.rouge_prompts:
        made.append("sft.rouge_prompts=4")
    return [*made, "eval.num_prompts=6", "eval.max_new_tokens=8"]

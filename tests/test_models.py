"""Tokenizers and models of other kinds than ours, and a clear word where they cannot work."""

import pytest
from conftest import WORDS, bpe_tokenizer, causal_lm, save_pair, word_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_recipes.config import Data, Recipe, RecipeError, Scratch
from rlhf_recipes.models import check_context, continuation, eos_token_ids, load_tokenizer, make_model, resolve_model


def metaspace_tokenizer(**special):
    """As SentencePiece has it: a blank belongs to the word behind it, and a decoder drops the first one."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.train_from_iterator(
        [" ".join(WORDS)],
        trainers.UnigramTrainer(
            vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **special)


@pytest.mark.parametrize("tokenizer", [word_tokenizer(), bpe_tokenizer(), metaspace_tokenizer()])
def test_prompt_plus_continuation_is_the_whole_text(tokenizer):
    whole = tokenizer("the film was great and fun")["input_ids"]
    for cut in range(1, len(whole)):
        prompt = tokenizer.decode(whole[:cut])
        assert (
            prompt + continuation(tokenizer, whole[:cut], [*whole[cut:], tokenizer.eos_token_id])
            == "the film was great and fun"
        )


def test_tokenizer_without_pad_pads_with_eos_on_the_left(tmp_path):
    save_pair(tmp_path, causal_lm(bpe_tokenizer()), metaspace_tokenizer())
    tokenizer = load_tokenizer("ppo.policy", str(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "left"


def test_tokenizers_that_cannot_work_are_refused(tmp_path):
    nothing = word_tokenizer()
    nothing.eos_token = None
    nothing.save_pretrained(tmp_path / "no_eos")
    with pytest.raises(RecipeError, match="ppo.policy.*no EOS"):
        load_tokenizer("ppo.policy", str(tmp_path / "no_eos"))
    ending = bpe_tokenizer()
    ending._tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", ending.eos_token_id)]
    )
    ending.save_pretrained(tmp_path / "ends")
    with pytest.raises(RecipeError, match="ends every text"):
        load_tokenizer("ppo.policy", str(tmp_path / "ends"))


def test_a_classifier_without_eos_ends_texts_with_its_separator(classifier_folder):
    tokenizer = load_tokenizer("reward.model", str(classifier_folder), classifier=True)
    assert tokenizer.eos_token == "[SEP]" and tokenizer.padding_side == "right"
    with pytest.raises(RecipeError, match="no EOS"):
        load_tokenizer("ppo.policy", str(classifier_folder))


def test_context_and_vocabulary_are_checked(tmp_path):
    tokenizer = word_tokenizer()
    save_pair(tmp_path, causal_lm(tokenizer), tokenizer)
    rows = Dataset.from_dict({"prompt": ["the film", "the " * 50]})
    check_context("ppo.policy", str(tmp_path), rows, tokenizer, new_tokens=14)
    with pytest.raises(RecipeError, match="50 tokens.*64"):
        check_context("ppo.policy", str(tmp_path), rows, tokenizer, new_tokens=15)
    with pytest.raises(RecipeError, match="the model only"):
        check_context("ppo.policy", str(tmp_path), rows, bpe_tokenizer(), new_tokens=1)


def test_references(tmp_path):
    recipe = Recipe(
        name="t",
        description="t",
        runs_dir=str(tmp_path),
        data=Data(path="x.jsonl"),
        reward_funcs=[{"name": "length"}],
        sft={"model": "gpt2"},
    )
    assert resolve_model(recipe, "ppo.policy", "openai-community/gpt2") == "openai-community/gpt2"
    with pytest.raises(RecipeError, match="ppo.policy.*rlhf-recipes sft t"):
        resolve_model(recipe, "ppo.policy", "stage:sft")
    with pytest.raises(RecipeError, match="has no stage reward"):
        resolve_model(recipe, "ppo.policy", "stage:reward")
    with pytest.raises(RecipeError, match="no such folder"):
        resolve_model(recipe, "ppo.policy", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no config.json"):
        resolve_model(recipe, "ppo.policy", str(tmp_path / "empty"))


def test_scratch_model_fits_its_tokenizer_and_the_seed():
    tokenizer = word_tokenizer()
    scratch = Scratch(
        architecture="llama",
        config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    first, second = (make_model(scratch, tokenizer, seed=3) for _ in range(2))
    assert first.config.vocab_size == len(tokenizer) and first.config.eos_token_id == tokenizer.eos_token_id
    assert all(a.equal(b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert eos_token_ids(first, tokenizer) == [tokenizer.eos_token_id]
    with pytest.raises(RecipeError, match="sft.scratch"):
        make_model(Scratch(architecture="gtp2"), tokenizer, seed=0)

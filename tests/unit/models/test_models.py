"""Tokenizers and models of many kinds, and a clear error for those that cannot work."""

import importlib
import json
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedTokenizerFast,
    T5Config,
)
from trl import RewardConfig, SFTConfig

from rlhf_recipes.data.tokenizer import continuation, eos_token_ids, load_tokenizer, token_ids
from rlhf_recipes.models.limits import check_context, fit_embeddings, fit_length
from rlhf_recipes.models.load import config_of
from rlhf_recipes.models.new_weights import make_model
from rlhf_recipes.recipe.schema import Recipe, RecipeError
from rlhf_recipes.recipe.sections import Data
from rlhf_recipes.recipe.stages import Scratch
from rlhf_recipes.runs.references import check_cache, hub_parts, is_hub_model, resolve_model
from support.stand_ins import smollm2
from support.texts import WORDS
from support.tiny_models import bpe_tokenizer, causal_lm, put_into_cache, save_pair, word_tokenizer


def recipe_with(**more) -> Recipe:
    needed = {"name": "t", "description": "t", "data": Data(path="x.jsonl"), "reward_funcs": [{"name": "length"}]}
    return Recipe(**needed | more)


RECIPE = recipe_with()


def metaspace_tokenizer(**special):
    """As in SentencePiece: a blank belongs to the word after it, and a decoder drops the first one."""
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
    tokenizer = load_tokenizer(RECIPE, "ppo.policy", str(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "left"


@pytest.fixture
def save(tmp_path):
    """Saves a tokenizer beside a model that it may or may not fit, and returns the folder."""

    def save(tokenizer, model=None) -> str:
        return str(save_pair(tmp_path / "saved", model or causal_lm(bpe_tokenizer()), tokenizer))

    return save


def test_a_tokenizer_without_eos_is_refused_or_given_the_recipes(save):
    folder = save(word_tokenizer(eos_token=None, pad_token=None))
    with pytest.raises(RecipeError, match=r"^sft.model: .*no EOS.*special_tokens=\{eos_token: "):
        load_tokenizer(RECIPE, "sft.model", folder)
    tokenizer = load_tokenizer(recipe_with(special_tokens={"eos_token": "!"}), "sft.model", folder)
    assert tokenizer.eos_token_id == word_tokenizer().get_vocab()["!"]  # in the vocabulary: nothing is added
    assert len(tokenizer) == len(word_tokenizer()) and tokenizer.pad_token == "!"


@pytest.mark.parametrize(
    ("pad", "given", "expected"),
    [
        (None, "[PAD]", "[PAD]"),
        ("<eos>", "[PAD]", "[PAD]"),  # pads with EOS: the recipe wants it to be distinct
        ("<pad>", "[PAD]", "<pad>"),  # has one of its own
        ("<eos>", None, "<eos>"),
        (None, None, "<eos>"),
    ],
)
@pytest.mark.parametrize("classifier", [False, True])
def test_which_token_pads(pad, given, expected, classifier, save):
    recipe = recipe_with(special_tokens={"pad_token": given} if given else {})
    folder = save(word_tokenizer(pad_token=pad))
    tokenizer = load_tokenizer(recipe, "sft.model", folder, classifier)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (expected, "<eos>")
    assert len(tokenizer) == len(word_tokenizer()) + (expected == "[PAD]")
    assert tokenizer("the [PAD] film").input_ids.count(tokenizer.pad_token_id) == (expected == "[PAD]")
    tokenizer.save_pretrained(folder)  # the next stage reads the saved tokenizer, with and without special_tokens
    for later in (RECIPE, recipe):
        assert load_tokenizer(later, "ppo.policy", folder).pad_token == expected


def test_a_prompt_that_always_ends_is_refused(save):
    ending = bpe_tokenizer()
    ending._tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", ending.eos_token_id)]
    )
    with pytest.raises(RecipeError, match="ends every text"):
        load_tokenizer(RECIPE, "ppo.policy", save(ending))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox"])
def test_embeddings_grow_only_where_there_is_no_room(architecture):
    tokenizer = word_tokenizer()
    roomy = causal_lm(tokenizer, architecture, vocab_size=len(tokenizer) + 7)
    tight = causal_lm(tokenizer, architecture)
    before = tight.get_input_embeddings().weight.detach().clone()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    for model in (roomy, tight):
        fit_embeddings("sft.model", model, tokenizer)
    assert roomy.config.vocab_size == roomy.get_input_embeddings().num_embeddings == len(tokenizer) + 6
    assert tight.config.vocab_size == tight.get_output_embeddings().out_features == len(tokenizer)
    assert tight.get_input_embeddings().weight[:-1].equal(before)


def test_a_classifiers_embeddings_grow_too(policy_folder):
    model = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=1)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    fit_embeddings("reward.model", model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == model.config.vocab_size


def test_a_policy_without_room_for_the_recipes_tokens_is_sent_to_sft(save):
    recipe = recipe_with(special_tokens={"pad_token": "[PAD]"})
    rows = Dataset.from_dict({"prompt": ["the film"]})
    folder = save(word_tokenizer(pad_token=None), causal_lm(word_tokenizer()))
    tokenizer = load_tokenizer(recipe, "ppo.policy", folder)
    with pytest.raises(RecipeError, match="ppo.policy.*the model only.*stage:sft"):
        check_context(recipe, "ppo.policy", folder, rows, tokenizer, 1)
    check_context(recipe, "eval.models.base", folder, rows, tokenizer, 1)  # eval makes room
    with pytest.raises(RecipeError, match="eval.models.base.*the model only"):
        check_context(recipe, "eval.models.base", folder, rows, bpe_tokenizer(), 1)
    roomy = save(word_tokenizer(pad_token=None), causal_lm(word_tokenizer(), vocab_size=64))
    check_context(recipe, "ppo.policy", roomy, rows, load_tokenizer(recipe, "ppo.policy", roomy), 1)


def test_a_classifier_without_eos_ends_texts_with_its_separator(classifier_folder):
    tokenizer = load_tokenizer(RECIPE, "reward.model", str(classifier_folder), classifier=True)
    assert tokenizer.eos_token == "[SEP]" and tokenizer.padding_side == "right"
    with pytest.raises(RecipeError, match="no EOS"):
        load_tokenizer(RECIPE, "ppo.policy", str(classifier_folder))


def test_context_and_vocabulary_are_checked(tmp_path):
    tokenizer = word_tokenizer()
    save_pair(tmp_path, causal_lm(tokenizer), tokenizer)
    rows = Dataset.from_dict({"prompt": ["the film", "the " * 50]})
    check_context(RECIPE, "ppo.policy", str(tmp_path), rows, tokenizer, new_tokens=14)
    keys = r"50 tokens.*64 of .*data.max_prompt_tokens.*data.prompt_tokens.*ppo.trainer.max_completion_length"
    with pytest.raises(RecipeError, match=keys):
        check_context(RECIPE, "ppo.policy", str(tmp_path), rows, tokenizer, new_tokens=15)
    with pytest.raises(RecipeError, match="eval.max_new_tokens"):
        check_context(RECIPE, "eval.models.sft", str(tmp_path), rows, tokenizer, new_tokens=15)
    with pytest.raises(RecipeError, match="the model only"):
        check_context(RECIPE, "ppo.policy", str(tmp_path), rows, bpe_tokenizer(), new_tokens=1)


def test_a_chat_models_template_counts_and_its_padding_is_not_its_eos(tmp_path):
    """SmolLM2-Instruct pads with its EOS, <|im_end|>, and its template adds a system message where there is none."""
    folder = str(smollm2(tmp_path))
    own = load_tokenizer(RECIPE, "ppo.policy", folder)
    assert own.pad_token_id == own.eos_token_id
    recipe = recipe_with(special_tokens={"pad_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(recipe, "ppo.policy", folder)
    assert tokenizer.pad_token == "<|endoftext|>" and len(tokenizer) == len(own)
    assert eos_token_ids(AutoModelForCausalLM.from_pretrained(folder), tokenizer) == [tokenizer.eos_token_id]
    prompt = [{"role": "user", "content": "the film"}]
    read = tokenizer.decode(token_ids(tokenizer, prompt))
    assert "You are a helpful AI assistant" in read and read.endswith("<|im_end|>\n<|im_start|>assistant\n")
    room = 2048 - len(token_ids(tokenizer, prompt))
    rows = Dataset.from_dict({"prompt": [prompt]})
    check_context(recipe, "ppo.policy", folder, rows, tokenizer, new_tokens=room)
    with pytest.raises(
        RecipeError, match=rf"longest prompt has {2048 - room} tokens.*2048 of .*data.max_prompt_tokens"
    ):
        check_context(recipe, "ppo.policy", folder, rows, tokenizer, new_tokens=room + 1)


@pytest.mark.parametrize(
    ("stage", "config_class", "section"),
    [("sft", SFTConfig, {"model": "x"}), ("reward", RewardConfig, {})],
)
def test_texts_are_no_longer_than_the_context(stage, config_class, section, policy_folder, tmp_path):
    def longest(tokenizer, **trainer):
        recipe = recipe_with(**{stage: section | {"trainer": trainer}})
        args = config_class(output_dir=str(tmp_path), use_cpu=True, bf16=False, **trainer)
        config = config_of(recipe, f"{stage}.model", str(policy_folder))
        fit_length(recipe, stage, config, tokenizer, args)
        return args.max_length

    tokenizer = word_tokenizer()
    assert longest(tokenizer) == 64  # TRL's default is 1024
    assert longest(tokenizer, max_length=64) == 64 and longest(tokenizer, max_length=8) == 8
    for wrong, said in ((65, 65), (None, "null")):
        with pytest.raises(RecipeError, match=f"{stage}.trainer.max_length is {said}, .* 64 tokens at most"):
            longest(tokenizer, max_length=wrong)
    tokenizer.model_max_length = 62  # RoBERTa's positions begin at 2
    assert longest(tokenizer) == 62


def test_models_of_the_wrong_kind(policy_folder, classifier_folder, tmp_path):
    config_of(RECIPE, "reward.model", str(policy_folder), classifier=True)
    with pytest.raises(
        RecipeError, match=r"reward\.model: .* is a classifier with 2 labels, and a reward model has one"
    ):
        config_of(RECIPE, "reward.model", str(classifier_folder), classifier=True)
    with pytest.raises(RecipeError, match=r"sft\.model: .* is a distilbert classifier, which writes no text"):
        config_of(RECIPE, "sft.model", str(classifier_folder))
    tokenizer = word_tokenizer()
    config = causal_lm(tokenizer).config
    config.num_labels = 1
    folder = str(save_pair(tmp_path / "gpt2", AutoModelForSequenceClassification.from_config(config), tokenizer))
    config_of(RECIPE, "reward.model", folder, classifier=True)  # keeps its head
    with pytest.raises(RecipeError, match="is a gpt2 classifier"):
        config_of(RECIPE, "ppo.policy", folder)
    DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1)).save_pretrained(tmp_path / "encoder")
    config_of(RECIPE, "reward.model", str(tmp_path / "encoder"), classifier=True)
    with pytest.raises(RecipeError, match="is a distilbert model, which writes no text"):
        config_of(RECIPE, "ppo.policy", str(tmp_path / "encoder"))


def test_references(tmp_path):
    recipe = recipe_with(runs_dir=str(tmp_path), sft={"model": "gpt2"})
    with pytest.raises(RecipeError, match="ppo.policy.*rlhf-recipes sft t"):
        resolve_model(recipe, "ppo.policy", "stage:sft")
    with pytest.raises(RecipeError, match="has no stage reward"):
        resolve_model(recipe, "ppo.policy", "stage:reward")
    with pytest.raises(RecipeError, match="no such folder"):
        resolve_model(recipe, "ppo.policy", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="no config.json"):
        resolve_model(recipe, "ppo.policy", str(tmp_path / "empty"))


def test_what_is_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_hub = ("gpt2", "org/name", "org/name@main", "org/name@refs/pr/1", "org/name/q4.gguf", "org/name@v1/a/q4.gguf")
    for reference in of_hub:
        assert is_hub_model(reference)
    local = ("./name@main", "/a/name@main", "a/b/c@main", "stage:sft", "package:rlhf_recipes/base", "fetched:smollm2")
    for reference in (*local, "q4.gguf", "a/q4.gguf", "./a/b/q4.gguf", "/a/b/c/q4.gguf", "package:a/b/c/q4.gguf"):
        assert not is_hub_model(reference)
    assert hub_parts("org/name@refs/pr/1/a/q4.gguf") == ("org/name", "refs/pr/1", "a/q4.gguf")
    (tmp_path / "org" / "name@main").mkdir(parents=True)
    assert not is_hub_model("org/name@main") and is_hub_model("org/name@v2")


def test_a_revision_is_that_revisions_weights(hub_cache, tmp_path):
    tokenizer = word_tokenizer()
    models = {ref: causal_lm(tokenizer, seed=seed) for seed, ref in enumerate(("main", "refs/pr/1", "v2"))}
    commits = {
        ref: put_into_cache(hub_cache, "org/name", save_pair(tmp_path / str(i), model, tokenizer), ref)
        for i, (ref, model) in enumerate(models.items())
    }
    assert len(set(commits.values())) == 3
    references = {f"org/name@{ref}": ref for ref in models} | {"org/name": "main", f"org/name@{commits['v2']}": "v2"}
    for reference, ref in references.items():
        folder = resolve_model(RECIPE, "ppo.policy", reference)
        assert folder == str(hub_cache / "models--org--name" / "snapshots" / commits[ref])
        weights = load_file(f"{folder}/model.safetensors")["transformer.wte.weight"]
        assert weights.equal(models[ref].get_input_embeddings().weight)
        assert load_tokenizer(RECIPE, "ppo.policy", reference).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(RecipeError, match="^ppo.policy: org/name@v3 cannot be used"):
        resolve_model(RECIPE, "ppo.policy", "org/name@v3")


@pytest.mark.parametrize("on_hub", [False, True])
def test_pickled_weights_are_refused(on_hub, hub_cache, policy_folder, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((policy_folder / "config.json").read_bytes())
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"anything")
    put_into_cache(hub_cache, "org/old", tmp_path / "model", "main")
    reference = "org/old" if on_hub else str(tmp_path / "model")
    with pytest.raises(RecipeError, match=f"^rloo.policy: {reference} has no weights in safetensors") as caught:
        resolve_model(RECIPE, "rloo.policy", reference)
    assert ("org/old@refs/pr/1" in str(caught.value)) == on_hub and "set rloo.policy to" in str(caught.value)


def test_only_what_is_needed_is_downloaded_and_once(hub_cache, policy_folder, monkeypatch, tmp_path):
    """The patterns that huggingface_hub gets, applied by itself to the listing of a repository."""
    from huggingface_hub.utils import filter_repo_objects

    asked = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)) or str(policy_folder)
    )
    for _ in range(2):
        assert resolve_model(RECIPE, "ppo.policy", "org/downloaded@v1") == str(policy_folder)
    assert len(asked) == 1
    name, how = asked[0]
    assert name == "org/downloaded" and how["revision"] == "v1" and not how["local_files_only"]
    assert how["cache_dir"] == hub_cache
    needed = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "vocab.txt"]
    needed += ["merges.txt", "tokenizer.json", "spm.model", "chat_template.jinja", "modeling_own.py", "scoring.json"]
    others = ["pytorch_model.bin", "tf_model.h5", "training_args.bin", "onnx/model.onnx", "optimizer.pt", "README.md"]
    others += ["rust_model.ot", "flax_model.msgpack", "consolidated.safetensors", "checkpoint-9/model.safetensors"]
    patterns = {kind: how[f"{kind}_patterns"] for kind in ("allow", "ignore")}
    found = filter_repo_objects(needed + others, allow_patterns=patterns["allow"], ignore_patterns=patterns["ignore"])
    assert list(found) == needed


@pytest.mark.parametrize("there", [True, False])
def test_old_weights_are_taken_from_the_conversion_of_the_hub(there, policy_folder, monkeypatch, tmp_path, caplog):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "config.json").write_text("{}")
    folders = {"main": tmp_path / "main", "refs/pr/7": policy_folder}

    def conversion(api, name):
        if there:
            return "refs/pr/7"
        raise OSError("no such file")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, revision, **how: str(folders[revision]))
    monkeypatch.setattr(
        importlib.import_module("transformers.safetensors_conversion"), "get_conversion_pr_reference", conversion
    )
    name = f"org/pickled-{there}"
    if there:
        assert resolve_model(RECIPE, "ppo.policy", name) == str(policy_folder)
        assert f"{name}@refs/pr/7" in caplog.text
    else:
        with pytest.raises(RecipeError, match="no weights in safetensors"):
            resolve_model(RECIPE, "ppo.policy", name)
    with pytest.raises(RecipeError, match="no weights in safetensors"):  # a pinned revision is never replaced
        resolve_model(RECIPE, "ppo.policy", f"{name}@main")


def test_code_of_a_model_runs_only_by_name(tmp_path, monkeypatch, capsys):
    tokenizer = word_tokenizer()
    folder = save_pair(tmp_path / "own", causal_lm(tokenizer), tokenizer)
    (folder / "own.py").write_text(
        "from transformers import GPT2Config\nclass OwnConfig(GPT2Config):\n    model_type = 'own'\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=rf"^ppo.policy: {folder} brings Python code.*trust_remote_code=\[{folder}\]"):
        config_of(RECIPE, "ppo.policy", str(folder))
    trusting = recipe_with(trust_remote_code=[str(folder)])
    with pytest.raises(RecipeError, match=f"rlhf-recipes trust {folder}"):
        config_of(trusting, "ppo.policy", str(folder))
    monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", str(folder))
    assert config_of(trusting, "ppo.policy", str(folder)).model_type == "own"
    assert f"a model's own code runs: {folder}" in capsys.readouterr().err


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


@pytest.mark.parametrize(("kind", "classifier"), [(T5Config, False), (T5Config, True), (BartConfig, False)])
def test_an_encoder_decoder_is_refused_where_it_would_be_trained(kind, classifier, tmp_path):
    """Before, stage reward trained it and rloo could not use it; of a policy, its tokenizer was blamed."""
    kind(d_model=8).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(RecipeError, match=r"^x\.model: .* is an encoder-decoder \((t5|bart)\): "):
        config_of(RECIPE, "x.model", str(tmp_path), classifier)


def test_variables_of_the_chat_template_are_the_same_in_training_and_eval(tmp_path):
    """Before, eval asked with another template than training: `chat_template_kwargs` of TRL was only in training."""
    template = "{{ messages[0].content }}{% if thinks %} and{% endif %}"
    word_tokenizer(chat_template=template).save_pretrained(tmp_path)
    causal_lm(word_tokenizer()).save_pretrained(tmp_path)
    recipe = recipe_with(chat_template_kwargs={"thinks": True})
    tokenizer = load_tokenizer(recipe, "ppo.policy", str(tmp_path))
    prompt = [{"role": "user", "content": "the film"}]
    assert tokenizer.decode(token_ids(tokenizer, prompt)) == "the film and"
    tokenizer.save_pretrained(tmp_path)  # as a trained policy
    assert load_tokenizer(recipe, "eval.models.ppo", str(tmp_path)).chat_template == tokenizer.chat_template
    assert (
        load_tokenizer(RECIPE, "ppo.policy", str(tmp_path)).apply_chat_template(prompt, tokenize=False).endswith("and")
    )


def test_a_cache_that_cannot_be_written_is_named():
    """Before, the data was said to be empty, or the model to be of no use."""
    nowhere = FileNotFoundError(2, "No such file or directory", "/proc/x")
    with pytest.raises(RecipeError, match="^HF_HOME: the cache /proc/x/hub cannot be written .*set HF_HOME or HF_HUB"):
        check_cache(nowhere, Path("/proc/x/hub"), "HF_HUB_CACHE")
    check_cache(FileNotFoundError(2, "No such file", "/data/rows.jsonl"), Path("/proc/x/hub"), "HF_HUB_CACHE")
    check_cache(ValueError("x"), Path("/proc/x/hub"), "HF_HUB_CACHE")

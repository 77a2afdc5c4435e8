"""Settings that are passed on to functions of transformers: what the function does not have is refused before it runs."""

import pytest

from rlhf_recipes import PPOConfig
from rlhf_recipes.recipe.schema import RecipeError


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycle": 2}},
         "lr_scheduler_kwargs.num_cycle: unknown key of cosine_with_restarts; nearest: num_cycles"),
        ({"model_init_kwargs": {"attn_implementatio": "eager"}},
         "model_init_kwargs.attn_implementatio: unknown key of .*; nearest: attn_implementation"),
        ({"logging_steps": 1000}, "logging_steps: 1000 is more than the 2 steps"),
    ],
)  # fmt: skip
def test_unknown_settings_of_a_library_are_refused_with_the_nearest(trainer, said, models, run):
    with pytest.raises(RecipeError, match=f"rloo.trainer.{said}"):
        run("rloo", {"rloo": {"policy": str(models["gpt2"]), "trainer": trainer}})


def test_settings_that_the_library_has_are_passed_on(models, run, trained):
    given = {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}}
    given |= {"model_init_kwargs": {"attn_implementation": "eager", "layer_norm_epsilon": 1e-4}}
    run("rloo", {"rloo": {"policy": str(models["gpt2"]), "trainer": given}})
    config = trained["rloo"].model.config
    assert (config._attn_implementation, config.layer_norm_epsilon) == ("eager", 1e-4)


def test_a_typing_error_in_the_configuration_from_scratch_is_refused(run):
    with pytest.raises(RecipeError, match="sft.scratch.config.n_layers: unknown key of GPT2Config; nearest: n_layer"):
        run("sft", {"sft": {"scratch": {"config": {"n_layers": 1}}}})
    run("sft", {"sft": {"scratch": {"config": {"num_hidden_layers": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}}}})


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"eos_token_id": [5]}, "the tokenizer and the model's generation_config.json"),
        ({"stop_strings": "x"}, "the tokenizer and the model's generation_config.json"),
        ({"max_new_tokens": 5}, "set max_completion_length"),
        ({"temprature": 1.0}, "no setting of GenerationConfig"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0: completions would not come from the policy's own distribution"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty=1.5"),
        ({"top_h": 0.5}, "top_h=0.5"),
    ],
)
def test_settings_of_generation_that_training_would_not_know_of_are_refused(kwargs, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        PPOConfig(str(tmp_path), use_cpu=True, bf16=False, generation_kwargs=kwargs)

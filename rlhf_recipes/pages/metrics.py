"""The registry of metrics: an entry here puts a metric into tables, plots, reports, the progress bar and trackers.

There is one dictionary for each file that holds metrics; its keys are the names in that file. `NAME` in a name stands for the
name of a reward function. `make docs` writes `TRAINING` and `EVAL` into the README.
"""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """One number that the project logs or reports.

    Attributes:
        meaning: Says what the number measures, to someone who does not know it.
        heading: Column of a table, or title of a plot. A metric without a heading is in files only.
        unit: "" for a number without a unit.
        form: Format of the number in a table.
        better: The good direction; None if neither is.
        trl: TRL's name of the same number. The trainers replace it by the name here.
        elsewhere: Names in the logs of plain TRL trainers: RLOO and GRPO of 1.16, PPO of 1.12.
        of_text: Whether it describes the texts; tables of models show these metrics apart.
        only: The algorithm that logs it; "" if all do.
        section: Section of the view that `rlhf-recipes wandb` saves; "" leaves it out.
        progress: Whether the progress bar shows it.
        banded: Whether comparisons draw its mean and interval over seeds.
        swept: Whether the table of a sweep shows it.
        phrase: Its name inside a verdict's sentence.
    """

    meaning: str
    heading: str = ""
    unit: str = ""
    form: str = "{:.3g}"
    better: Literal["higher", "lower"] | None = None
    trl: str | None = None
    elsewhere: tuple[str, ...] = ()
    of_text: bool = False
    only: str = ""
    section: str = ""
    progress: bool = False
    banded: bool = False
    swept: bool = False
    phrase: str = ""

    @property
    def title(self) -> str:
        return f"{self.heading}, {self.unit}" if self.unit else self.heading


TRAINING = {
    "score_mean": Metric(
        "weighted sum of the reward functions, mean over completions",
        "score (mean of a rollout)",
        better="higher",
        trl="reward",
        elsewhere=("objective/scores",),
        section="Score",
        progress=True,
        banded=True,
    ),
    "score_std": Metric("standard deviation of that score", trl="reward_std"),
    "score/NAME": Metric("mean of one reward function", better="higher"),
    "score/NAME/std": Metric("its standard deviation"),
    "reward_mean": Metric(
        "the number that training raises: the score after normalization, clipping and `missing_eos`, minus `beta` times "
        "the KL",
        better="higher",
        section="Score",
        banded=True,
    ),
    "kl": Metric(
        "log pi - log pi_ref of the sampled tokens (k1), summed over a completion; without a reference (`beta: 0`) "
        "there is no KL metric",
        "KL to the reference",
        "nats per completion",
        better="lower",
        elsewhere=("objective/kl",),
        section="Distance from the SFT model",
        progress=True,
        banded=True,
    ),
    # TRL's RLOO and GRPO log the mean over tokens as `kl`.
    "kl_per_token": Metric(
        "the same, mean over tokens",
        unit="nats per token",
        better="lower",
        elsewhere=("kl",),
        section="Distance from the SFT model",
        banded=True,
    ),
    "kl_k3": Metric(
        "the KL by the k3 estimate, which is never negative, summed over a completion",
        unit="nats per completion",
        better="lower",
    ),
    "kl_k3_per_token": Metric("the same, mean over tokens", unit="nats per token", better="lower"),
    "beta": Metric("weight of the KL in the reward"),
    "entropy": Metric(
        "entropy of the policy's next-token distribution, mean over completion tokens",
        "entropy",
        "nats per token",
        elsewhere=("policy/entropy_avg",),
        section="Text",
        banded=True,
    ),
    "length_mean": Metric(
        "mean length of a completion, EOS counted",
        "completion length",
        "tokens",
        trl="completions/mean_length",
        section="Text",
        banded=True,
    ),
    "length_min": Metric("shortest completion", unit="tokens", trl="completions/min_length"),
    "length_max": Metric("longest completion", unit="tokens", trl="completions/max_length"),
    "eos_rate": Metric("share of completions that end with EOS; the others are cut off", section="Text", banded=True),
    "loss": Metric("the loss of the optimizer step", section="Training", progress=True),
    "policy_loss": Metric("the policy's part of the loss", elsewhere=("loss/policy_avg",)),
    "ratio": Metric(
        "probability ratio of the policy to the rollout's policy, mean over tokens (PPO) or completions (RLOO)"
    ),
    "clip_fraction": Metric(
        "share of ratios whose clipped value decides the loss", elsewhere=("policy/clipfrac_avg",), banded=True
    ),
    "approx_kl": Metric(
        "KL of the policy to the rollout's policy (k3)",
        unit="nats per token",
        elsewhere=("policy/approxkl_avg",),
        section="Distance from the SFT model",
    ),
    "grad_norm": Metric("norm of the last optimizer step's gradient, before clipping", section="Training"),
    "learning_rate": Metric("step size of the last optimizer step"),
    "tokens": Metric("tokens of prompts and completions so far", unit="tokens", trl="num_tokens"),
    "episodes": Metric("completions sampled so far", unit="episodes", elsewhere=("episode",)),
    "episodes_per_second": Metric(
        "completions per second of training", unit="1/s", better="higher", section="Training"
    ),
    "seconds_generate": Metric("time spent on sampling since the last line", unit="s"),
    "seconds_score": Metric("time spent in reward functions since the last line", unit="s"),
    "seconds_forward": Metric("time spent in passes without gradient since the last line", unit="s"),
    "seconds_update": Metric("time spent in passes with gradient and in optimizer steps since the last line", unit="s"),
    "value_loss": Metric("the value network's loss", better="lower", elsewhere=("loss/value_avg",), only="ppo"),
    "value_clip_fraction": Metric("share of values that leave the clip range", only="ppo"),
    "value_mean": Metric("mean of the predicted returns", only="ppo"),
    "return_mean": Metric("mean of the returns", only="ppo"),
    "explained_variance": Metric(
        "how well values predict returns: 1 is perfect, 0 is no better than predicting their mean",
        better="higher",
        only="ppo",
    ),
    "baseline_mean": Metric("mean of the baseline", only="rloo"),
    "no_signal_fraction": Metric(
        "share of prompts whose completions all have advantage 0, so that training learns nothing from them",
        better="lower",
        only="rloo",
    ),
}
"""In `metrics.jsonl` of PPO and RLOO: means over all processes since the last line."""

SUPERVISED = {
    "accuracy": Metric("share of pairs whose chosen text scores higher", better="higher", progress=True),
    "mean_token_accuracy": Metric("share of tokens that the model finds likeliest", better="higher", progress=True),
}
"""In `metrics.jsonl` of `sft` and `reward`, under TRL's names; `loss` is there too."""

EVAL = {
    "score_mean": Metric(
        "mean of the score that PPO and RLOO are trained on",
        "score",
        form="{:.2f}",
        better="higher",
        swept=True,
        phrase="mean score",
    ),
    "score_std": Metric("standard deviation of that score over the completions", "std", form="{:.2f}"),
    "score_min": Metric("smallest score"),
    "score_max": Metric("largest score"),
    "score/NAME": Metric("mean of one reward function; `/std`, `/min` and `/max` are logged too", better="higher"),
    "positive_share": Metric(
        "share of completions whose score is above `eval.positive_threshold`",
        "positive",
        form="{:.0%}",
        better="higher",
        swept=True,
    ),
    "held_out_mean": Metric(
        "mean score of reward functions that training does not see (`eval.held_out_funcs`)",
        "held out",
        form="{:.2f}",
        better="higher",
        swept=True,
        phrase="mean held-out score",
    ),
    "held_out_positive_share": Metric("share of completions whose held-out score is above 0", better="higher"),
    "held_out/NAME": Metric("mean of one held-out reward function", better="higher"),
    "kl": Metric(
        "KL between the model and the reference (`eval.reference`), on the model's own samples",
        "KL",
        "nats per completion",
        "{:.1f}",
        "lower",
        swept=True,
    ),
    "kl_per_token": Metric("the same over all tokens of the samples", "KL/token", "nats per token", "{:.3f}", "lower"),
    "perplexity": Metric(
        "perplexity of the samples under the reference; lower is closer to its language", "perplexity", form="{:.1f}"
    ),
    "perplexity_other": Metric(
        "perplexity of the samples' texts under another model (`eval.perplexity_model`), per token of that model",
        "other perplexity",
        form="{:.1f}",
    ),
    "rouge1": Metric(
        "F1 of the words that a completion shares with the gold completion, no stemming",
        "ROUGE-1",
        form="{:.3f}",
        better="higher",
    ),
    "rouge2": Metric("F1 of the pairs of words that both share", "ROUGE-2", form="{:.3f}", better="higher"),
    "rougeL": Metric("F1 of the longest common subsequence of words", "ROUGE-L", form="{:.3f}", better="higher"),
    "length_mean": Metric(
        "mean length of a completion, EOS not counted", "length", "tokens", "{:.1f}", of_text=True, swept=True
    ),
    "length_std": Metric("standard deviation of that length", unit="tokens"),
    "eos_rate": Metric(
        "share of completions that end with EOS; the others are cut off", "EOS", form="{:.0%}", of_text=True
    ),
    "empty_share": Metric("share of empty completions", "empty", form="{:.0%}", better="lower", of_text=True),
    "distinct_1": Metric(
        "number of different tokens over number of tokens in all samples",
        "distinct-1",
        form="{:.2f}",
        better="higher",
        of_text=True,
    ),
    "distinct_2": Metric("the same for pairs of tokens", "distinct-2", form="{:.2f}", better="higher", of_text=True),
    "distinct_3": Metric(
        "the same for three tokens in a row", "distinct-3", form="{:.2f}", better="higher", of_text=True
    ),
    "unique_token_ratio": Metric(
        "number of different tokens over number of tokens in a completion, mean",
        "unique",
        form="{:.2f}",
        better="higher",
        of_text=True,
    ),
    "repetition": Metric(
        "share of 4-token sequences that occurred earlier in the completion, mean",
        "repeated",
        form="{:.1%}",
        better="lower",
        of_text=True,
    ),
}
"""In `eval.json`, for each model."""

RESULTS = {
    "score_last": Metric("mean score of the last tenth of the rollouts", "training score", form="{:.2f}"),
    "eval_perplexity": Metric(
        "perplexity of held-out texts under the SFT model", "perplexity", form="{:.1f}", better="lower"
    ),
    "eval_accuracy": Metric(
        "share of held-out pairs whose chosen text scores higher", "accuracy", form="{:.1%}", better="higher"
    ),
}
"""In `results` of a stage's manifest: the numbers that the table of a sweep shows."""

AUDIT = {
    "step": Metric("optimizer step", "step", form="{}"),
    "episodes": Metric("completions sampled so far", "episodes", form="{}"),
    "score": Metric("weighted sum of `reward_funcs`", "score", form="{:.2f}", better="higher"),
    "held_out": Metric("score by `eval.held_out_funcs`", "held out", form="{:.2f}", better="higher"),
    "kl": Metric("KL to the reference", "KL", "nats per completion", "{:.1f}", "lower"),
    "entropy": Metric("of the policy's next token", "entropy", "nats per token", "{:.2f}"),
    "eos_rate": Metric("share of completions that end", "EOS", form="{:.0%}"),
    "length": Metric("words per completion", "words", form="{:.1f}"),
    "length_score_correlation": Metric("rank correlation of length and score", "length~score", form="{:.2f}"),
    "repetition": Metric("share of word pairs that repeat", "repeated", form="{:.0%}", better="lower"),
    "longest_common_run": Metric("longest run of words taken from the prompt", "run", "words", "{:.1f}"),
    "copied_share": Metric("share of words taken from the prompt", "copied", form="{:.0%}"),
    "title_copied_share": Metric("share of completions that copy the prompt's title", "title", form="{:.0%}"),
}
"""In an audit, for each part of a training and each checkpoint."""

COST = {
    "seconds": Metric("wall time of the training", "training time", "s", better="lower"),
    "peak_memory_gib": Metric("most memory of a process", "peak memory", "GiB", better="lower"),
    "peak_gpu_memory_gib": Metric("most memory of a GPU", "peak GPU memory", "GiB", better="lower"),
    "tokens": Metric("tokens sampled", "tokens sampled"),
    "episodes_per_second": Metric("completions per second", "episodes per second", better="higher"),
}
"""In a comparison, for each run."""

RENAMED = {metric.trl: name for name, metric in TRAINING.items() if metric.trl}
"""TRL's name of a metric -> the name here, in the logs of this project's trainers."""

FROM_TRL = RENAMED | {other: name for name, metric in TRAINING.items() for other in metric.elsewhere}
"""The same in the logs of plain TRL trainers."""


def our_name(logged: str, names: dict[str, str]) -> str | None:
    """The project's name of a number that TRL logs: `score/NAME` for `rewards/NAME/mean`; None if `names` lacks it."""
    if func := re.fullmatch(r"rewards/(.+)/(mean|std)", logged):
        return f"score/{func[1]}" + ("/std" if func[2] == "std" else "")
    return names.get(logged)


def tabled(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics that have a heading."""
    return {name: metric for name, metric in metrics.items() if metric.heading}


def markdown(metrics: dict[str, Metric]) -> str:
    """The table of metrics in the README."""
    labels = {"ppo": " (PPO)", "rloo": " (RLOO)", "": ""}
    rows = [
        f"| `{name}`{labels[metric.only]} | {metric.meaning} | {metric.unit} | {metric.better or ''} |\n"
        for name, metric in metrics.items()
    ]
    return "".join(["| metric | meaning | unit | better |\n|---|---|---|---|\n", *rows])

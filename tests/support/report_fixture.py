"""A comparison as `compare` makes it, from random numbers, to test pages and pictures without training."""

import math
import random
import re
from statistics import fmean
from typing import Any

WORDS = "the film was great bad good awful fun dull i liked hated it a movie plot and acting very not . !".split()


def make_comparison(
    algorithms: tuple[str, ...] = ("ppo", "rloo"),
    seeds: tuple[int, ...] = (42, 43, 44),
    steps: int = 60,
    prompts: int = 24,
    words: int = 12,
    metrics: int = 4,
) -> dict[str, Any]:
    """Draw a comparison.

    Args:
        algorithms: Labels of the runs.
        seeds: One run of each algorithm a seed.
        steps: Lines of a run's log.
        prompts: Held-out prompts with samples; 0 leaves the evaluation out.
        words: Mean words of a completion.
        metrics: How many more metrics each line has.
    """
    draw = random.Random(0)
    runs = [
        _run(draw, algorithm, seed, steps, 0.65 - 0.05 * i, metrics)
        for i, algorithm in enumerate(algorithms)
        for seed in seeds
    ]
    names = ["sft", *(f"{run['algorithm']}-seed_{run['seed']}" for run in runs)]
    measured = {name: _measured(draw, 0.1 if name == "sft" else 0.6, i) for i, name in enumerate(names)}
    lengths = list(range(20))
    evaluation = {
        "recipe": "imdb_tiny",
        "num_prompts": prompts,
        "seed": 42,
        "reference": "sft",
        "models": measured,
        "length_histograms": {
            "edges": lengths,
            "counts": {name: [draw.randrange(1, 30) for _ in lengths[1:]] for name in names},
        },
    }
    two = len(algorithms) == 2
    label = f"{algorithms[0].upper()} better" if two else "nothing to compare"
    views = [_view(name, i, algorithms, len(seeds)) for i, name in enumerate(("held_out", "episodes", "seconds"))]
    return {
        "title": "imdb_tiny: " + " and ".join(algorithm.upper() for algorithm in algorithms),
        "created": "2026-11-21T16:00:00+00:00",
        "algorithms": list(algorithms),
        "runs": runs,
        "comparable": True,
        "single_seed": len(seeds) == 1,
        "differences": [
            _difference("rloo.baseline", "algorithm", runs, lambda run: None if run["algorithm"] == "ppo" else "mean"),
            _difference("ppo.trainer.num_iterations", "algorithm", runs, lambda run: len(run["algorithm"]) - 1),
        ],
        "verdict": {
            "winner": algorithms[0] if two else None,
            "label": label,
            "sentence": f"{label} on 24 held-out prompts: 0.64 against 0.59, difference 0.05 (0.02 to 0.08), "
            f"{len(seeds)} seeds each.",
        },
        "views": views if two else [],
        "held_out": _held_out(measured, algorithms) if prompts else None,
        "bands": {axis: _bands(runs, axis) for axis in ("episodes", "tokens", "seconds")},
        "frontier": [
            {
                "run": run["name"],
                "algorithm": run["algorithm"],
                "seed": run["seed"],
                "training": list(map(list, zip(run["curves"]["kl"], run["curves"]["score_mean"], strict=True))),
                "held_out": [4.0 + 0.1 * i, 0.6] if prompts else None,
            }
            for i, run in enumerate(runs)
        ],
        "cost": {
            algorithm: {
                "seconds": {"mean": 60.0 - 10 * i, "low": 55.0 - 10 * i, "high": 66.0 - 10 * i},
                "peak_memory_gib": {"mean": 1.2 - 0.3 * i, "low": 1.1 - 0.3 * i, "high": 1.3 - 0.3 * i},
                "peak_gpu_memory_gib": None,
                "tokens": {"mean": 40_000.0, "low": None, "high": None},
                "episodes_per_second": {"mean": 70.0, "low": 66.0, "high": 75.0},
            }
            for i, algorithm in enumerate(algorithms)
        },
        "evaluation": evaluation if prompts else None,
        "samples": [_sample(draw, names, words) for _ in range(prompts)],
        "judge": [_judged(*algorithms)] if two and prompts else [],
        "audit": {run["name"]: _audited(run) for run in runs},
        "notes": ["SFT model: perplexity 46.6 on held-out texts."],
    }


def _run(draw: random.Random, algorithm: str, seed: int, steps: int, top: float, metrics: int) -> dict[str, Any]:
    at = range(1, steps + 1)
    rise = [1 - math.exp(-4 * step / steps) for step in at]
    curves = {
        "step": list(at),
        "episodes": [64 * step for step in at],
        "tokens": [700.0 * step for step in at],
        "seconds": [round(0.9 * step, 3) for step in at],
        "score_mean": [0.1 + top * up + draw.gauss(0, 0.05) for up in rise],
        "kl": [5 * up + draw.gauss(0, 0.2) for up in rise],
        "entropy": [3.7 - up + draw.gauss(0, 0.05) for up in rise],
        "length_mean": [9 + 2 * up + draw.gauss(0, 0.4) for up in rise],
        "value_loss": [0.1 if algorithm == "ppo" and step % 7 else None for step in at],
    }
    curves |= {f"metric_{i}": [draw.gauss(0, 1) for _ in at] for i in range(metrics)}
    return {
        "name": f"{algorithm} seed {seed}",
        "algorithm": algorithm,
        "seed": seed,
        "path": f"runs/imdb_tiny/duel/{algorithm}-seed_{seed}/{algorithm}",
        "source": "rlhf_recipes",
        "results": {"score_last": curves["score_mean"][-1]},
        "episodes": curves["episodes"][-1],
        "tokens": curves["tokens"][-1],
        "seconds": curves["seconds"][-1],
        "wall_seconds": 54.3,
        "peak_memory_gib": 0.72,
        "peak_gpu_memory_gib": None,
        "episodes_per_second": 71.0,
        "settings": {"data.path": "reviews.csv", f"{algorithm}.trainer.learning_rate": 3e-4, "episodes": 64 * steps},
        "hardware": "2 cores, 23.5 GiB",
        "versions": {"trl": "1.16.0", "torch": "2.13.0"},
        "curves": curves,
    }


def _measured(draw: random.Random, score: float, i: int) -> dict[str, float | None]:
    return {
        "score_mean": score + draw.gauss(0, 0.02),
        "positive_share": 0.9,
        "held_out_mean": 1.0 + draw.gauss(0, 0.05),
        "kl": 5.0 * bool(i),
        "length_mean": 10.5,
        "distinct_1": 0.22,
        "eos_rate": 0.93,
        "perplexity": None if i == 1 else 48.2,
    }


def _held_out(measured: dict[str, dict[str, Any]], algorithms: tuple[str, ...]) -> dict[str, Any]:
    table = {}
    for metric in measured["sft"]:
        table[metric] = {}
        for algorithm in algorithms:
            values = [row[metric] for name, row in measured.items() if name.startswith(f"{algorithm}-")]
            known = [value for value in values if value is not None]
            table[metric][algorithm] = {
                "mean": fmean(known) if known else None,
                "low": min(known) if len(known) > 1 else None,
                "high": max(known) if len(known) > 1 else None,
                "values": values,
            }
    return {"metrics": table, "prompts": 24}


def _view(name: str, i: int, algorithms: tuple[str, ...], seeds: int) -> dict[str, Any]:
    several = seeds > 1
    return {
        "view": name,
        "metric": "score_mean",
        "at": None if name == "held_out" else 3840 if name == "episodes" else 54.0,
        "unit": {"held_out": "prompts", "episodes": "episodes", "seconds": "s"}[name],
        "paired": True,
        "seeds": dict.fromkeys(algorithms, seeds),
        "means": {algorithm: 0.64 - 0.05 * j for j, algorithm in enumerate(algorithms)},
        "difference": 0.05 - 0.02 * i,
        "interval": [0.02 - 0.04 * i, 0.08] if several else None,
        "bootstrap": [0.03 - 0.04 * i, 0.07] if several else None,
        "winner": algorithms[0] if several and i == 0 else None,
        "label": "PPO better" if several and i == 0 else "inconclusive",
        "sentence": "By this view.",
    }


def _difference(key: str, kind: str, runs: list[dict[str, Any]], value: Any) -> dict[str, Any]:
    return {"key": key, "kind": kind, "refuses": False, "values": {run["name"]: value(run) for run in runs}}


def _bands(runs: list[dict[str, Any]], axis: str) -> dict[str, Any]:
    bands = {}
    for metric in ("score_mean", "kl", "entropy", "length_mean"):
        bands[metric] = {}
        for algorithm in dict.fromkeys(run["algorithm"] for run in runs):
            mine = [run["curves"] for run in runs if run["algorithm"] == algorithm]
            columns = list(zip(*(curves[metric] for curves in mine), strict=True))[:400]
            bands[metric][algorithm] = {
                "x": mine[0][axis][:400],
                "mean": [fmean(column) for column in columns],
                "low": [min(column) for column in columns] if len(mine) > 1 else None,
                "high": [max(column) for column in columns] if len(mine) > 1 else None,
                "seeds": len(mine),
            }
    return bands


def _sample(draw: random.Random, names: list[str], words: int) -> dict[str, Any]:
    def text(length: int) -> str:
        return " ".join(draw.choices(WORDS, k=length))

    models = {}
    for name in names:
        completion = text(draw.randint(1, 2 * words))
        models[name] = {
            "completion": completion,
            "score": round(draw.uniform(-1, 1), 4),
            "held_out": round(draw.gauss(0, 1), 4),
            "scores": {"vader_sentiment": 0.5},
            "tokens": len(completion.split()),
            "finished": draw.random() < 0.9,
        }
    return {"prompt": text(4), "models": models}


def _judged(a: str, b: str) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "backend": "local",
        "model": "some/judge",
        "prompts": 100,
        "wins": 55,
        "losses": 35,
        "ties": 8,
        "unparsable": 2,
        "inconsistent": 6,
        "win_rate": 0.6,
        "interval": [0.5, 0.7],
        "length_controlled": {"win_rate": 0.57, "interval": [0.46, 0.68]},
        "by_length": [{"from": -1.0, "to": 0.0, "prompts": 50, "win_rate": 0.55}],
        "agreement": {"with": "score", "share": 0.7, "pairs": 90},
        "cost": {"requests": 200},
        "pairs": [],
    }


def _audited(run: dict[str, Any]) -> dict[str, Any]:
    bins = [
        {"step": 6 * i, "episodes": 384 * i, "completions": 24, "score": 0.06 * i, "held_out": 0.1 * i - 0.01 * i * i}
        | {"length_score_correlation": 0.1, "eos_rate": 0.95, "repetition": 0.02, "copied_share": 0.0}
        | {"longest_common_run": 1.2, "title_copied_share": None, "entropy": 3.0, "kl": 0.5 * i}
        for i in range(1, 11)
    ]
    return {
        "run": run["path"],
        "stage": run["algorithm"],
        "held_out_name": "judge",
        "bins": bins,
        "checkpoints": [{"name": "final", "step": 60, "score_mean": 0.6, "held_out_mean": 0.9, "kl": 5.0}],
        "peak": {"step": 30, "checkpoint": None, "held_out": 0.25, "by": "completions", "above_end": False},
        "signs": 1,
        "findings": ["the trained score rose by 0.3 while the held-out score fell by 0.1 after step 30"],
    }


EVIL = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><a href='https://a.example'>b</a>"
    "\"' & | `x` <!-- \u2028 [a](b)"
)


NAMED = re.compile(r"seed[ _]\d|\.|^sft$")
"""Keys that are names of runs, models and settings."""


def poison(value):
    """The same comparison with markup in every text and name that comes from models or users."""
    if isinstance(value, dict):
        return {
            key + EVIL if NAMED.search(key) else key: item
            if key in ("source", "kind", "view", "metric")
            else poison(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [poison(item) for item in value]
    return value + EVIL if isinstance(value, str) and value not in ("ppo", "rloo") else value


def nothing_known(comparison):
    """The same comparison without any number of views, costs, samples and held-out models."""
    for view in comparison["views"]:
        view |= {"difference": None, "interval": None, "bootstrap": None, "at": None}
        view["means"] = dict.fromkeys(view["means"])
    comparison["cost"] = {name: dict.fromkeys(cost) for name, cost in comparison["cost"].items()}
    for line in comparison["samples"]:
        for found in line["models"].values():
            found |= {"score": None, "held_out": None, "tokens": None, "finished": None}
    comparison["evaluation"]["models"] = {
        name: dict.fromkeys(metrics) for name, metrics in comparison["evaluation"]["models"].items()
    }
    return comparison


def unequal():
    comparison = make_comparison(seeds=(42,))
    comparison["comparable"] = False
    comparison["verdict"] = {"winner": None, "label": "not comparable", "sentence": "The runs differ in data.path."}
    comparison["differences"].append(
        {
            "key": "data.path",
            "kind": "data",
            "refuses": True,
            "values": {"ppo seed 42": "a.csv", "rloo seed 42": "b.csv"},
        }
    )
    return comparison


def empty():
    none = dict.fromkeys(("held_out", "evaluation"))
    lists = {key: [] for key in ("algorithms", "runs", "differences", "views", "frontier", "samples", "judge", "notes")}
    verdict = {"winner": None, "label": "nothing to compare", "sentence": "No runs."}
    more = {"title": "t", "created": "now", "comparable": False, "single_seed": False, "verdict": verdict}
    return none | lists | more | {"bands": {}, "cost": {}, "audit": {}}


def no_lines():
    """The same comparison with empty logs."""
    comparison = make_comparison(seeds=(42,))
    for run in comparison["runs"]:
        run["curves"] = {key: [] for key in run["curves"]}
    return comparison | {"bands": {}, "frontier": [run | {"training": []} for run in comparison["frontier"]]}


CASES = {
    "seeds": make_comparison,
    "one run": lambda: make_comparison(algorithms=("ppo",), seeds=(42,)),
    "no evaluation": lambda: make_comparison(prompts=0),
    "three labels": lambda: make_comparison(algorithms=("grpo", "ppo", "rloo")),
    "not comparable": unequal,
    "nothing known": lambda: nothing_known(make_comparison()),
    "a stranger's text": lambda: poison(make_comparison()),
    "no lines": no_lines,
    "empty": empty,
}

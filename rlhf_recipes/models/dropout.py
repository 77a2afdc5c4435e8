"""Finds and switches off every source of random noise in a model's forward pass.

Not every dropout is an `nn.Dropout`: OPT, XGLM, BioGPT and Llama keep a rate as a number in a layer, Falcon and GPT-J read
it from the configuration, and mixtures of experts have noise in the router.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

RATE = re.compile("drop|jitter")
"""In the names of rates: `attention_dropout`, `resid_pdrop`, `layerdrop`, `router_jitter_noise`."""


def rates(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Every rate above 0: its owner (a layer or a configuration), its name and its value."""
    seen = set()
    for layer in model.modules():
        for owner in (layer, vars(layer).get("config")):
            if not hasattr(owner, "__dict__") or id(owner) in seen:  # the config of DeepSpeed's engine is a dict
                continue
            seen.add(id(owner))
            is_dropout = isinstance(owner, _DropoutNd)
            for name, value in list(vars(owner).items()):
                if isinstance(value, float) and value > 0 and (RATE.search(name) or (is_dropout and name == "p")):
                    yield owner, name, value


def switch_off(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Sets every rate to 0; returns what was there, for `switch_on`."""
    found = list(rates(model))
    for owner, name, _ in found:
        setattr(owner, name, 0.0)
    return found


def switch_on(found: list[tuple[Any, str, float]]) -> None:
    """Puts rates back."""
    for owner, name, value in found:
        setattr(owner, name, value)

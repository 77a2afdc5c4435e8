"""Numbers of parameters of a model and the memory of its layers, from its configuration alone."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from rlhf_recipes.planning.machine import FLOAT32, Launch
from rlhf_recipes.planning.trace import Curve, build, measure_layers, quantized_layers

WITHOUT_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
"""Dropout of attention weights: a GPU's kernels draw it again in the backward pass, and keep nothing for it."""

_known: dict[str, Any] = {}
"""Models that this process has counted and layers that it has measured, by the settings that they depend on."""


@dataclass(frozen=True)
class Model:
    """The properties of one model that its memory depends on; numbers of parameters unless stated otherwise."""

    parameters: int
    """All, with an adapter's; tied ones count once."""
    trained: int
    """Those with a gradient."""
    embeddings: int
    """Those of the input embeddings; 0 if they are frozen."""
    head: int
    """Those of the layer that computes logits."""
    head_trained: bool
    vocabulary: int
    hidden: int
    layers: int
    cache: int
    """Numbers that generation keeps per token: keys and values of all layers."""
    quantized: int
    quantized_bytes: float
    """Bytes of a quantized parameter, with its share of the scales."""
    saved: Curve
    """Memory that the layers keep for the backward pass, without gradient checkpointing."""
    working: Curve
    """Additional memory that the backward pass needs for a moment."""
    forward: Curve
    """Peak memory of a pass without gradients."""
    loaded_bytes: int = FLOAT32
    """Bytes of a weight; only for reward models."""


def model_of(
    config: PreTrainedConfig,
    launch: Launch,
    classifier: bool = False,
    dropout: bool = False,
    peft_config: Any = None,
    quantization_config: Any = None,
    trained: bool = True,
) -> Model:
    """A model's numbers, without its weights.

    Args:
        config: Of a language model or classifier; it stays unchanged.
        launch: The launch that trains it.
        classifier: True if the model returns one number instead of logits.
        dropout: True if it trains with dropout, as in stage sft.
        peft_config: peft's `LoraConfig` of an adapter. None: all weights are trained.
        quantization_config: transformers' `BitsAndBytesConfig`.
        trained: False if there is no backward pass.
    """
    how = {"classifier": classifier, "peft_config": peft_config, "quantization_config": quantization_config}
    config = copy.deepcopy(config)
    if classifier:
        config.num_labels = 1
    for name in WITHOUT_DROPOUT if launch.device != "cpu" or not dropout else ():
        if isinstance(getattr(config.get_text_config(), name, None), float):
            setattr(config.get_text_config(), name, 0.0)
    key = _key(config, launch, dropout, trained, how)
    if key not in _known:
        # The head makes no difference to the layers, so a policy and a classifier share one measurement.
        of_layers = how | {"classifier": type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING}
        layers_key = "layers of " + _key(config, launch, dropout, trained, of_layers)
        if layers_key not in _known:
            _known[layers_key] = measure_layers(config, launch, dropout, trained, **of_layers)
        _known[key] = _counted(config, trained, _known[layers_key], **how)
    return _known[key]


def _key(config: PreTrainedConfig, launch: Launch, dropout: bool, trained: bool, how: dict[str, Any]) -> str:
    shown = how | {name: repr(value and value.to_dict()) for name, value in how.items() if name.endswith("_config")}
    values = config.to_dict() | {"num_labels": None, "id2label": None, "label2id": None}
    return repr((values, launch.half, launch.weight_bytes, launch.device, dropout, trained, shown))


def _counted(
    config: PreTrainedConfig,
    trained: bool,
    curves: dict[str, Any],
    classifier: bool,
    peft_config: Any,
    quantization_config: Any,
) -> Model:
    text = config.get_text_config()
    with torch.device("meta"):
        model = build(config, classifier, peft_config)
    quantized = quantized_layers(model, quantization_config)
    if not trained:
        model.requires_grad_(False)
    head = model.get_output_embeddings() if not classifier else None
    embeddings = model.get_input_embeddings().weight
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Model(
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        embeddings=embeddings.numel() if embeddings.requires_grad else 0,
        head=head.weight.numel() if head is not None else 0,
        head_trained=head is not None and head.weight.requires_grad,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        cache=2 * text.num_hidden_layers * heads * width,
        quantized=sum(module.weight.numel() for module in quantized),
        quantized_bytes=_bytes_of_quantized(quantization_config),
        **curves,
    )


def _bytes_of_quantized(quantization_config: Any) -> float:
    if quantization_config is None:
        return 0.0
    if quantization_config.load_in_8bit:
        return 1.0
    # Each block of 64 weights has a float32 scale; double quantization gives it 8 bits, and each 256 scales a float32 one.
    return 0.5 + (1 / 64 + 4 / (64 * 256) if quantization_config.bnb_4bit_use_double_quant else 4 / 64)

"""Measures the memory that a model's layers keep, without loading weights.

`model_of` runs one and two layers of a model on tensors without content (`FakeTensorMode`), so that a new architecture
needs no new formula.
"""

import copy
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from rlhf_recipes.planning.machine import Launch
from rlhf_recipes.planning.memory import Curve, Model

ENCODERS = ("bert", "distilbert", "roberta", "deberta", "deberta-v2", "electra", "albert", "xlm-roberta", "modernbert")
"""Models whose layers have no cache to turn off."""

WITHOUT_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
"""Dropout of attention weights, which a GPU's kernels draw again in the backward pass instead of keeping it."""


def model_of(
    config: PreTrainedConfig,
    launch: Launch,
    classifier: bool = False,
    dropout: bool = False,
    peft_config: Any = None,
    quantization_config: Any = None,
    trained: bool = True,
) -> Model:
    """A model's numbers, from its configuration alone.

    Its parameters are counted on the meta device. What its layers keep is measured with one and two layers, and few short
    rows, and goes on from there: layers are taken to be alike.

    Args:
        config: Of a language model or classifier; it stays as it is.
        launch: How it is trained.
        classifier: Whether it gives one number instead of logits.
        dropout: Whether it trains with dropout, as stage sft does.
        peft_config: peft's `LoraConfig` of an adapter. None: all weights are trained.
        quantization_config: transformers' `BitsAndBytesConfig`.
        trained: Whether there is a backward pass at all.
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
        # A head makes no difference to the layers, but encoders have none for texts.
        of_layers = how | {"classifier": type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING}
        layers_key = _key(config, launch, dropout, trained, of_layers) + " layers"
        if layers_key not in _known:
            _known[layers_key] = _measured(config, launch, dropout, trained, of_layers)
        _known[key] = _counted(config, how, trained, _known[layers_key])
    return _known[key]


_known: dict[str, Any] = {}
"""Measurements made in this process, by the settings they depend on."""


def _key(config: PreTrainedConfig, launch: Launch, dropout: bool, trained: bool, how: dict[str, Any]) -> str:
    shown = how | {name: repr(value and value.to_dict()) for name, value in how.items() if name.endswith("_config")}
    values = config.to_dict() | {"num_labels": None, "id2label": None, "label2id": None}
    return repr((values, launch.half, launch.weight_bytes, launch.device, dropout, trained, shown))


def _counted(config: PreTrainedConfig, how: dict[str, Any], trained: bool, curves: dict[str, Curve]) -> Model:
    text = config.get_text_config()
    with torch.device("meta"):
        whole = _made(config, **how)
    packed = _packed(whole, how["quantization_config"])
    if not trained:
        whole.requires_grad_(False)
    head = whole.get_output_embeddings() if not how["classifier"] else None
    embeddings = whole.get_input_embeddings().weight
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Model(
        parameters=sum(p.numel() for p in whole.parameters()),
        trained=sum(p.numel() for p in whole.parameters() if p.requires_grad),
        embeddings=embeddings.numel() if embeddings.requires_grad else 0,
        head=head.weight.numel() if head is not None else 0,
        head_trained=head is not None and head.weight.requires_grad,
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=layers,
        cache=2 * layers * heads * width,
        quantized=sum(module.weight.numel() for module in packed),
        quantized_bytes=_bytes_of_quantized(how["quantization_config"]),
        **curves,
    )


def _made(
    config: PreTrainedConfig, classifier: bool, peft_config: Any, quantization_config: Any, dtype: Any = None
) -> Any:
    auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=dtype or torch.float32)
    if peft_config is None:
        return model
    from peft import get_peft_model

    peft_config = copy.deepcopy(peft_config)
    peft_config.inference_mode = False  # as it is on disk
    peft_config.init_lora_weights = True  # others look at the weights, which are not there
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # which makes no difference in size
        return get_peft_model(model, peft_config)


def _packed(model: nn.Module, quantization_config: Any) -> list[nn.Module]:
    """Layers that bitsandbytes quantizes: all linear ones but the head, and those of an adapter."""
    if quantization_config is None:
        return []
    skipped = set(quantization_config.llm_int8_skip_modules or ())
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not module.weight.requires_grad
        and not skipped & set(name.split("."))
    ]


def _bytes_of_quantized(quantization_config: Any) -> float:
    if quantization_config is None:
        return 0.0
    if quantization_config.load_in_8bit:
        return 1.0
    # A block of 64 has one scale in float32; quantized twice, in 8 bits, of which 256 have a scale again.
    return 0.5 + (1 / 64 + 4 / (64 * 256) if quantization_config.bnb_4bit_use_double_quant else 4 / 64)


def _measured(
    config: PreTrainedConfig, launch: Launch, dropout: bool, trained: bool, how: dict[str, Any]
) -> dict[str, Curve]:
    text = config.get_text_config()
    layers, T = text.num_hidden_layers, min(64, (getattr(text, "max_position_embeddings", None) or 256) // 4)
    # Experts are picked by what they are given, but for a kernel in bf16.
    experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    autocast = launch.autocast and not experts
    dtype = torch.bfloat16 if launch.weight_bytes == 2 or experts else torch.float32
    found = []
    for number in (1, 2) if trained else (2,):
        with torch.device("meta"):
            model = _made(_with_layers(config, number), **how)
        packed = _packed(model, how["quantization_config"])
        with FakeTensorMode():
            _fake(model, dtype)
            _prepare(model, packed, how["quantization_config"], dropout)
            points = ((1, T), (1, 2 * T), (1, 4 * T), (2, T))
            found.append([_pass(model, *point, autocast, trained, whole=number == 2) for point in points])
    one, two = ([[at[i] for at in of_points] for i in range(3)] for of_points in (found[0], found[-1]))
    scale = 2 if experts and not launch.half else 1
    saved = [(a + (layers - 1) * (b - a)) * scale for a, b in zip(one[0], two[0], strict=True)]
    return {
        "saved": _fitted(saved, T),
        "working": _fitted([scale * value for value in two[1]], T),
        "forward": _fitted([scale * value for value in two[2]], T),
    }


def _fitted(values: list[float], T: int) -> Curve:
    """The curve through what was measured with one row of T, 2 T and 4 T tokens, and two rows of T."""
    at_1, at_2, at_4, two_rows = values
    square = ((at_4 - at_2) / 2 - (at_2 - at_1)) / (3 * T * T)
    token = (at_2 - at_1) / T - 3 * T * square
    row = (two_rows - at_1) - token * T - square * T * T
    return Curve(fixed=2 * at_1 - two_rows, row=row, token=token, square=square)


def _fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Put tensors of the CPU, without content, in the place of a meta model's; call it in a `FakeTensorMode`."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied ones stay tied
                    empty = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]


def _with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = number
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:number])
    return config


def _prepare(model: nn.Module, packed: list[nn.Module], quantization_config: Any, dropout: bool) -> None:
    """Make a model behave as in training, with gradients that vanish: `moments` counts them."""
    adapted = hasattr(model, "peft_config")
    base = model.get_base_model() if adapted else model
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    if not adapted:
        base.get_input_embeddings().register_forward_hook(lambda layer, args, output: output.requires_grad_())
    for module in packed:
        module.forward = _Packed(module, quantization_config)
    model.train()


def _pass(
    model: nn.Module, rows: int, tokens: int, autocast: bool, trained: bool, whole: bool
) -> tuple[float, float, float]:
    """Bytes that the layers keep, that the backward pass needs beyond it, and that a pass without gradient needs.

    Unless `whole`, only the first.
    """
    layers = (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    known = [*model.parameters(), *model.buffers(), ids]

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            more = {} if layers.config.model_type in ENCODERS else {"use_cache": False}
            return layers(**inputs, **more)[0]

    saved, working, needed = 0, 0, 0
    if trained:
        with _Live(known) as live:
            hidden_states = forward()
            saved = live.now
            if whole:
                hidden_states.backward(torch.empty_like(hidden_states))
        working = live.peak - saved
    if whole:
        with _Live(known) as live, torch.no_grad():
            forward()
        needed = live.peak
    return saved, working, needed


class _Live(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, while they live."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Packed:
    """Forward pass of a linear layer whose weights are in 4 or 8 bits: they are unpacked each time they are used."""

    def __init__(self, layer: nn.Module, quantization_config: Any):
        self._shape = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
        self._dtype = torch.float16 if quantization_config.load_in_8bit else quantization_config.bnb_4bit_compute_dtype

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Unpacked.apply(x.to(self._dtype), self._shape).to(x.dtype)


class _Unpacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.shape = shape
        return x @ x.new_empty(shape).T

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ gradient.new_empty(ctx.shape), None

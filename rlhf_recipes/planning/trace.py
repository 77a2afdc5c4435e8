"""Measures the memory that a model's layers need, without weights.

A model of one and of two layers runs on tensors without content (`FakeTensorMode`), and the operations tell what they
allocate. A new architecture needs no new formula.
"""

import copy
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_recipes.planning.machine import Launch


@dataclass(frozen=True)
class Curve:
    """Bytes for B rows of T tokens: fixed + B (row + token T + square T^2)."""

    fixed: float = 0.0
    row: float = 0.0
    token: float = 0.0
    square: float = 0.0

    def __call__(self, rows: int, tokens: int) -> float:
        return max(self.fixed + rows * (self.row + self.token * tokens + self.square * tokens**2), 0.0)


def build(config: PreTrainedConfig, classifier: bool, peft_config: Any) -> Any:
    """A model with its adapter, in float32; on the meta device it has sizes only."""
    auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32)
    if peft_config is None:
        return model
    from peft import get_peft_model

    peft_config = copy.deepcopy(peft_config)
    peft_config.inference_mode = False  # an adapter on disk has True
    peft_config.init_lora_weights = True  # other ways need the weights
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # it does not change sizes
        return get_peft_model(model, peft_config)


def quantized_layers(model: nn.Module, quantization_config: Any) -> list[nn.Module]:
    """Layers that bitsandbytes quantizes: all linear ones except the head and an adapter's."""
    if quantization_config is None:
        return []
    skipped = set(quantization_config.llm_int8_skip_modules or ())
    head = model.get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not module.weight.requires_grad
        and not skipped & set(name.split("."))
    ]


def measure_layers(
    config: PreTrainedConfig,
    launch: Launch,
    dropout: bool,
    trained: bool,
    classifier: bool,
    peft_config: Any,
    quantization_config: Any,
) -> dict[str, Curve]:
    """Memory of all layers: `saved`, `working` and `forward` of `Model`.

    Measures short texts and two layers, and extrapolates: layers are assumed to be alike.
    """
    text = config.get_text_config()
    layers, T = text.num_hidden_layers, min(64, (getattr(text, "max_position_embeddings", None) or 256) // 4)
    # The choice of experts depends on content, so a mixture of experts is measured with its kernel for bf16.
    experts = any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    autocast = launch.autocast and not experts
    dtype = torch.bfloat16 if launch.weight_bytes == 2 or experts else torch.float32
    found = []
    for number in (1, 2) if trained else (2,):
        with torch.device("meta"):
            model = build(_with_layers(config, number), classifier, peft_config)
        quantized = quantized_layers(model, quantization_config)
        with FakeTensorMode():
            _fake(model, dtype)
            _prepare(model, quantized, quantization_config, dropout)
            points = ((1, T), (1, 2 * T), (1, 4 * T), (2, T))
            found.append([_pass(model, *point, autocast, trained, whole=number == 2) for point in points])
    one, two = ([[at[i] for at in of_points] for i in range(3)] for of_points in (found[0], found[-1]))
    scale = 2 if experts and not launch.half else 1
    saved = [scale * (a + (layers - 1) * (b - a)) for a, b in zip(one[0], two[0], strict=True)]
    working, forward = ([scale * value for value in values] for values in two[1:])
    return {"saved": fit(saved, T), "working": fit(working, T), "forward": fit(forward, T)}


def fit(values: list[float], T: int) -> Curve:
    """The curve through four measurements: one row of T, 2 T and 4 T tokens, and two rows of T."""
    at_1, at_2, at_4, two_rows = values
    square = ((at_4 - at_2) / 2 - (at_2 - at_1)) / (3 * T * T)
    token = (at_2 - at_1) / T - 3 * T * square
    row = (two_rows - at_1) - token * T - square * T * T
    return Curve(fixed=2 * at_1 - two_rows, row=row, token=token, square=square)


def _fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace the tensors of a meta model by CPU tensors without content; needs `FakeTensorMode`."""
    made = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied tensors stay tied
                    empty = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = made[id(tensor)]


def _with_layers(config: PreTrainedConfig, number: int) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers, text.use_cache = number, False
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(text, name, None), list):
            setattr(text, name, getattr(text, name)[:number])
    return config


def _prepare(model: nn.Module, quantized: list[nn.Module], quantization_config: Any, dropout: bool) -> None:
    """Make a model behave as in training, and drop its gradients: `moments` counts them."""
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
    for module in quantized:
        module.forward = _Packed(module, quantization_config)
    model.train()


def _pass(
    model: nn.Module, rows: int, tokens: int, autocast: bool, trained: bool, whole: bool
) -> tuple[float, float, float]:
    """Bytes that the layers keep, additional bytes of the backward pass, and bytes of a pass without gradients.

    Only the first number is measured unless `whole`.
    """
    layers = (model.get_base_model() if hasattr(model, "peft_config") else model).base_model
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    known = [*model.parameters(), *model.buffers(), ids]

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return layers(input_ids=ids, attention_mask=torch.ones_like(ids))[0]

    saved, working, forward_peak = 0, 0, 0
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
        forward_peak = live.peak
    return saved, working, forward_peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the live storages that operations create."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

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
    """Forward pass of a linear layer whose weights have 4 or 8 bits: every use unpacks them."""

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

"""Memory of one training process, in bytes: what a stage keeps, and what it needs at its worst moments.

What a model's layers keep for the backward pass is not written down here for each architecture: `model_of` runs one and two
layers of it on tensors without content (`FakeTensorMode`), so that a new architecture needs no new formula. All else is
arithmetic, in `moments`.
"""

import copy
import warnings
import weakref
from dataclasses import dataclass, fields
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

GIB = 2**30

FLOAT32 = 4

REDUCE_BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`, by its default: a buffer of that size is there in every backward pass."""

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""Of the tiles in which TRL's SFTTrainer goes through logits. Source: trl/kernels/chunked_logprob.py."""

TILE_COPIES = 7.25
"""Tiles in float32 that are there at once where TRL has no Triton kernel. Source: `_backward_tile` in the same file."""

CHUNK = {"cpu": 2**19, "cuda": 2**26}
"""Logits that ours work on at once. Source: `rows_at_once` of forward.py."""

OPTIMIZER_BYTES = {"adafactor": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion": 4}
"""Bytes of states for each trained number, where they are not Adam's 8; in 8 bits a quarter of it."""

ENCODERS = ("bert", "distilbert", "roberta", "deberta", "deberta-v2", "electra", "albert", "xlm-roberta", "modernbert")
"""Models whose layers have no cache to turn off."""

WITHOUT_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
"""Dropout of attention weights, which a GPU's kernels draw again in the backward pass instead of keeping it."""


@dataclass(frozen=True)
class Curve:
    """Bytes for B rows of T tokens: fixed + B (row + token T + square T^2)."""

    fixed: float = 0.0
    row: float = 0.0
    token: float = 0.0
    square: float = 0.0

    def __call__(self, rows: int, tokens: int) -> float:
        return max(self.fixed + rows * (self.row + self.token * tokens + self.square * tokens**2), 0.0)


@dataclass(frozen=True)
class Model:
    """What memory depends on, of one model; numbers of parameters where nothing else is said."""

    parameters: int
    """Those that are tied count once; an adapter's are among them."""
    trained: int
    """Those that have a gradient."""
    embeddings: int
    """Those of the input embeddings, where they are trained."""
    head: int
    """Those of the layer that makes logits."""
    head_trained: bool
    vocabulary: int
    hidden: int
    layers: int
    cache: int
    """Numbers that generation keeps for each token: keys and values of all layers."""
    quantized: int
    quantized_bytes: float
    """Bytes of each quantized parameter, its share of scales included."""
    saved: Curve
    """What the layers keep for the backward pass, without gradient checkpointing."""
    working: Curve
    """What the backward pass needs beyond it for a moment."""
    forward: Curve
    """The most that a pass without gradient needs."""
    loaded_bytes: int = FLOAT32
    """Bytes of a weight, of a reward model."""


@dataclass(frozen=True)
class Batch:
    """What one process works on; `prompt` and `completion` in tokens, the longest that may be."""

    stage: str
    rows: int
    """Rows of a micro-batch; in stage reward texts, two of each pair."""
    prompt: int
    completion: int
    """In stages sft and reward 0: `prompt` is the whole text."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    rollout: int = 0
    """Completions between two samplings."""
    sampled: int = 0
    """Those of them that are sampled at once."""
    reference: bool = False
    """Whether a copy of the policy is kept."""
    optimizer: str = "adamw_torch_fused"
    """transformers' `optim`."""
    checkpointing: bool = False
    """Whether layers keep their input only, and are run again in the backward pass."""


@dataclass(frozen=True)
class Launch:
    """How a stage is started."""

    processes: int = 1
    zero_stage: int = 0
    offload: bool = False
    """Whether DeepSpeed keeps master weights, gradients and optimizer states in the CPU's memory."""
    half: bool = False
    """bf16 or fp16: autocast over float32 weights; under DeepSpeed the weights themselves."""
    device: str = "cuda"

    @property
    def autocast(self) -> bool:
        return self.half and self.zero_stage == 0

    @property
    def weight_bytes(self) -> int:
        return 2 if self.half and self.zero_stage else FLOAT32


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at one moment."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    buffers: float = 0.0
    """Of DDP and DeepSpeed."""
    reference: float = 0.0
    value_model: float = 0.0
    """Weights of a separate value network; its gradients, states and activations are among the policy's."""
    reward_models: float = 0.0
    rollout: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(
    policy: Model, batch: Batch, launch: Launch, value: Model | None = None, reward_models: tuple[Model, ...] = ()
) -> Estimate:
    """The worst of a stage's `moments`."""
    return max(moments(policy, batch, launch, value, reward_models).values(), key=lambda moment: moment.total)


def moments(
    policy: Model, batch: Batch, launch: Launch, value: Model | None = None, reward_models: tuple[Model, ...] = ()
) -> dict[str, Estimate]:
    """What is there in `update` (backward pass or optimizer step) and, of ppo and rloo, in `sampling`.

    Args:
        policy: The model that is trained, as `model_of` sees it under `launch`.
        batch: What a process works on.
        launch: How the stage is started.
        value: A value network of its own; None: a head on the policy, or none.
        reward_models: Of the reward functions, each loaded whole by every process.
    """
    kept = _kept(policy, batch, launch, value, reward_models)
    worst = max(_backward(policy, batch, launch, value), _step(policy, batch, launch, value), key=_sum)
    found = {"update": Estimate(**kept | worst)}
    if batch.rollout:
        found["sampling"] = Estimate(**kept | _sampling(policy, batch, launch, reward_models))
    return found


def _sum(items: dict[str, float]) -> float:
    return sum(items.values())


def _kept(
    policy: Model, batch: Batch, launch: Launch, value: Model | None, reward_models: tuple[Model, ...]
) -> dict[str, float]:
    """What is there all the time."""
    whole = policy.parameters - policy.quantized
    trained = policy.trained + (value.trained if value else 0)
    states = _states(policy, batch.optimizer, launch.device) + (
        _states(value, batch.optimizer, launch.device) if value else 0
    )
    if launch.zero_stage:
        states = 0 if launch.offload else (states + FLOAT32 * trained) / launch.processes  # and master weights
    return {
        "weights": whole * launch.weight_bytes + policy.quantized * policy.quantized_bytes,
        "optimizer": states,
        "buffers": FLOAT32 * trained if launch.processes > 1 and not launch.zero_stage else 0,
        "reference": whole * launch.weight_bytes if batch.reference else 0,
        "value_model": value.parameters * launch.weight_bytes if value else 0,
        "reward_models": sum(model.loaded_bytes * model.parameters for model in reward_models),
        # Ids and masks are int64; log-probabilities, advantages, values and returns float32.
        "rollout": batch.rollout * (16 * batch.prompt + (16 + 24) * batch.completion),
    }


def _states(model: Model, optimizer: str, device: str) -> float:
    """Bytes of an optimizer's states; paged ones leave a GPU when its memory is short."""
    if "paged" in optimizer and device != "cpu":
        return 0
    each = next((number for name, number in OPTIMIZER_BYTES.items() if name in optimizer), 8)
    if "8bit" not in optimizer:
        return each * model.trained
    # transformers has bitsandbytes keep those of embeddings in 32 bits.
    return each / 4 * (model.trained - model.embeddings) + each * model.embeddings


def _backward(policy: Model, batch: Batch, launch: Launch, value: Model | None) -> dict[str, float]:
    trained = policy.trained + (value.trained if value else 0)
    of_head = policy.head * FLOAT32 if policy.head_trained and batch.stage != "reward" else 0
    of_layers = [_activations(model, batch, launch) for model in (policy, value) if model is not None]
    saved, working = sum(kept for kept, _ in of_layers), max(needed for _, needed in of_layers)
    logits, while_working = _logits(policy, batch, launch)
    start = {"activations": saved + max(working - while_working, 0), "logits": logits + while_working}
    if not launch.zero_stage:
        gradients = trained * FLOAT32
        if batch.accumulation > 1:
            return start | {"gradients": gradients + of_head}
        # In the end the gradient of the embeddings comes, beside that of the head if both are one.
        end = {"gradients": gradients + (of_head or FLOAT32 * policy.embeddings)}
        return max(start | {"gradients": of_head}, end, key=_sum)
    # DeepSpeed copies gradients into a bucket. When that is full, or in the end, it is copied once more to be reduced.
    copied = launch.weight_bytes * min(REDUCE_BUCKET, trained)
    gradients = 0 if launch.offload else launch.weight_bytes * trained
    gradients /= launch.processes if launch.zero_stage > 1 else 1
    bucket, early = launch.weight_bytes * REDUCE_BUCKET, copied if trained > REDUCE_BUCKET else 0
    if launch.device == "cpu":  # which has memory only for what is written
        bucket, early = copied, 0
        start |= {"buffers": launch.weight_bytes * policy.head if of_head else 0}
    else:
        start |= {"buffers": bucket + early}
    if batch.accumulation > 1:
        start |= {"gradients": gradients}
    return max(start, {"buffers": bucket + copied, "gradients": gradients}, key=_sum)


def _activations(model: Model, batch: Batch, launch: Launch) -> tuple[float, float]:
    """Bytes that the layers keep for the backward pass, and that it needs beyond it for a moment."""
    tokens = batch.prompt + batch.completion
    saved, working = model.saved(batch.rows, tokens), model.working(batch.rows, tokens)
    if not batch.checkpointing:
        return saved, working
    # Each layer's input, what comes before the first and behind the last; one layer is whole at a time. Autocast's copies of
    # all weights are there until the forward pass ends.
    inputs = batch.rows * tokens * model.hidden * launch.weight_bytes * (model.layers + 3)
    return inputs, max(saved / model.layers + working, model.saved.fixed)


def _logits(policy: Model, batch: Batch, launch: Launch) -> tuple[float, float]:
    """Bytes of logits and their gradient, and what work on them takes for a moment."""
    half = 2 if launch.half else FLOAT32
    of_autocast = 2 * policy.head if launch.autocast and batch.stage != "reward" else 0  # the head's weights in bf16
    if batch.stage == "reward":
        return 0, 0
    if batch.stage == "sft":
        positions = batch.rows * batch.prompt
        tokens = min(positions, TILE_TOKENS)
        tile = tokens * TILE_VOCABULARY * half
        if launch.device == "cpu":  # without Triton: torch's operations, each with a tile of its own
            written = tokens * min(policy.vocabulary, TILE_VOCABULARY)
            tile = written * (half + FLOAT32 * TILE_COPIES)
        return of_autocast, tile + FLOAT32 * positions * policy.hidden
    numbers = batch.rows * batch.completion * policy.vocabulary
    # Under autocast accelerate makes float32 of them, and their gradient cannot take their place.
    kept = numbers * (2 * FLOAT32 if launch.autocast else half)
    return of_autocast + kept, 3 * FLOAT32 * min(numbers, CHUNK[launch.device])


def _step(policy: Model, batch: Batch, launch: Launch, value: Model | None) -> dict[str, float]:
    trained = policy.trained + (value.trained if value else 0)
    gradients = trained * launch.weight_bytes
    if launch.zero_stage:
        # A rank's part as it came, and a flat copy in float32.
        gradients = 0 if launch.offload else trained * (launch.weight_bytes + FLOAT32) / launch.processes
    # All but the fused ones work on all parameters at once.
    fused = "fused" in batch.optimizer or "8bit" in batch.optimizer or launch.device == "cpu" or launch.offload
    copies = 0 if fused else FLOAT32 * trained / (launch.processes if launch.zero_stage else 1)
    return {"gradients": gradients + copies}


def _sampling(policy: Model, batch: Batch, launch: Launch, reward_models: tuple[Model, ...]) -> dict[str, float]:
    number = 2 if launch.half else FLOAT32
    tokens = batch.prompt + batch.completion
    logits = batch.sampled * policy.vocabulary * (FLOAT32 + (2 if launch.autocast else 0))
    drawn = min(batch.sampled * policy.vocabulary, CHUNK[launch.device]) * 20  # float32 twice and float64
    whole = batch.sampled * tokens * policy.cache * number
    start = {
        "kv_cache": batch.sampled * batch.prompt * policy.cache * number,
        "activations": policy.forward(batch.sampled, batch.prompt),
    }
    one = whole / (2 * policy.layers)  # a layer's keys, while they are copied into a longer tensor
    end = {"kv_cache": whole + one, "activations": policy.forward.fixed, "logits": logits + drawn}
    scored = {"activations": max((model.forward(min(64, batch.sampled), tokens) for model in reward_models), default=0)}
    return max(start, end, scored, key=_sum)


# Models without weights


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
"""What has been measured in this process, by what it depends on."""


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

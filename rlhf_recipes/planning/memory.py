"""Memory of one training process, in bytes: what a stage keeps, and what it needs at its worst moments.

Everything here is arithmetic. What a model's layers keep for the backward pass is measured in `trace`.
"""

from dataclasses import dataclass, fields

from rlhf_recipes.planning.machine import FLOAT32, Launch

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
    """The properties of one model that its memory depends on; numbers of parameters unless stated otherwise."""

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
    """Memory that the layers keep for the backward pass, without gradient checkpointing."""
    working: Curve
    """Additional memory that the backward pass needs for a moment."""
    forward: Curve
    """The most that a pass without gradient needs."""
    loaded_bytes: int = FLOAT32
    """Bytes of a weight, of a reward model."""


@dataclass(frozen=True)
class Batch:
    """The batch of one process; `prompt` and `completion` are the longest lengths allowed, in tokens."""

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
    """Memory in use during `update` (backward pass or optimizer step) and, for ppo and rloo, during `sampling`.

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
    """Memory in use all the time."""
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

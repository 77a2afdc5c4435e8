"""Memory of one training process, in bytes, at the worst moments of a stage.

Everything here is arithmetic on sizes: `models` counts a model's parameters, and `trace` measures its layers.
"""

from dataclasses import dataclass, fields

from rlhf_recipes.planning.machine import FLOAT32, Launch
from rlhf_recipes.planning.models import Model

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, in elements: every backward pass has a buffer of this size."""

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
"""Size of the tiles in which TRL's SFTTrainer computes logits. Source: trl/kernels/chunked_logprob.py."""

TILE_COPIES = 7.25
"""Number of float32 tiles in memory at once without TRL's Triton kernel. Source: `_backward_tile` in the same file."""

CHUNK = {"cpu": 2**19, "cuda": 2**26}
"""Number of logits that PPO and RLOO process at once. Source: `rows_at_once` of models/forward.py."""

OPTIMIZER_BYTES = {"adafactor": 0, "sgd": 0, "adagrad": 4, "rmsprop": 4, "lion": 4}
"""Optimizer -> bytes of its states per trained number, if not Adam's 8. An 8-bit optimizer needs a quarter."""


@dataclass(frozen=True)
class Batch:
    """The batch of one process; `prompt` and `completion` are the longest lengths allowed, in tokens."""

    stage: str
    rows: int
    """Texts or completions of a micro-batch; a pair of stage reward has two texts."""
    prompt: int
    completion: int
    """0 in stages sft and reward, where `prompt` is the whole text."""
    accumulation: int = 1
    """Micro-batches of an optimizer step."""
    rollout: int = 0
    """Completions of a rollout; 0 in stages sft and reward."""
    sampled: int = 0
    """Completions that are sampled at once."""
    reference: bool = False
    """True if a frozen copy of the policy is in memory."""
    optimizer: str = "adamw_torch_fused"
    """transformers' `optim`."""
    checkpointing: bool = False
    """True if layers keep only their input, and run again in the backward pass."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process at one moment."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    buffers: float = 0.0
    """Buffers of DDP and DeepSpeed."""
    reference: float = 0.0
    value_model: float = 0.0
    """Weights of a separate value network. The policy's items contain its gradients, states and activations."""
    reward_models: float = 0.0
    rollout: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    kv_cache: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def moments(
    policy: Model, batch: Batch, launch: Launch, value: Model | None = None, reward_models: tuple[Model, ...] = ()
) -> dict[str, Estimate]:
    """Peak memory of `update` (backward pass or optimizer step) and, for ppo and rloo, of `sampling`.

    Args:
        policy: The trained model, measured by `model_of` for the same launch.
        batch: The batch of one process.
        launch: The launch of the stage.
        value: A separate value network. None: a head on the policy, or no value network.
        reward_models: Models of the reward functions; every process loads all of them.
    """
    kept = _kept(policy, batch, launch, value, reward_models)
    worst = max(_backward(policy, batch, launch, value), _step(policy, batch, launch, value), key=_sum)
    peaks = {"update": Estimate(**kept | worst)}
    if batch.rollout:
        peaks["sampling"] = Estimate(**kept | _sampling(policy, batch, launch, reward_models))
    return peaks


def _sum(items: dict[str, float]) -> float:
    return sum(items.values())


def _kept(
    policy: Model, batch: Batch, launch: Launch, value: Model | None, reward_models: tuple[Model, ...]
) -> dict[str, float]:
    """Memory in use all the time."""
    whole, trained = policy.parameters - policy.quantized, _trained(policy, value)
    states: float = sum(
        _states(model, batch.optimizer, launch.device) for model in (policy, value) if model is not None
    )
    if launch.zero_stage:  # it keeps master weights beside the states
        states = 0 if launch.offload else (states + FLOAT32 * trained) / launch.num_processes
    return {
        "weights": whole * launch.weight_bytes + policy.quantized * policy.quantized_bytes,
        "optimizer": states,
        "buffers": FLOAT32 * trained if launch.num_processes > 1 and not launch.zero_stage else 0,
        "reference": whole * launch.weight_bytes if batch.reference else 0,
        "value_model": value.parameters * launch.weight_bytes if value else 0,
        "reward_models": sum(model.loaded_bytes * model.parameters for model in reward_models),
        # Ids and masks are int64; log-probabilities, advantages, values and returns float32.
        "rollout": batch.rollout * (16 * batch.prompt + (16 + 24) * batch.completion),
    }


def _trained(policy: Model, value: Model | None) -> int:
    return policy.trained + (value.trained if value else 0)


def _states(model: Model, optimizer: str, device: str) -> float:
    """Bytes of an optimizer's states."""
    if "paged" in optimizer and device != "cpu":
        return 0  # paged states leave the GPU when its memory is short
    each = next((number for name, number in OPTIMIZER_BYTES.items() if name in optimizer), 8)
    if "8bit" not in optimizer:
        return each * model.trained
    # transformers tells bitsandbytes to keep the states of embeddings in 32 bits.
    return each / 4 * (model.trained - model.embeddings) + each * model.embeddings


def _backward(policy: Model, batch: Batch, launch: Launch, value: Model | None) -> dict[str, float]:
    trained = _trained(policy, value)
    of_head: float = policy.head * FLOAT32 if policy.head_trained and batch.stage != "reward" else 0
    of_layers = [_activations(model, batch, launch) for model in (policy, value) if model is not None]
    saved, working = sum(kept for kept, _ in of_layers), max(needed for _, needed in of_layers)
    logits, while_working = _logits(policy, batch, launch)
    start = {"activations": saved + max(working - while_working, 0), "logits": logits + while_working}
    if not launch.zero_stage:
        gradients: float = trained * FLOAT32
        if batch.accumulation > 1:
            return start | {"gradients": gradients + of_head}
        # The gradient of the embeddings is the last; if they are tied to the head, the head's is still in memory.
        end = {"gradients": gradients + (of_head or FLOAT32 * policy.embeddings)}
        return max(start | {"gradients": of_head}, end, key=_sum)
    # DeepSpeed copies gradients into a bucket. To reduce it, when it is full or at the end, DeepSpeed copies it again.
    copied = launch.weight_bytes * min(REDUCE_BUCKET, trained)
    gradients = 0 if launch.offload else launch.weight_bytes * trained
    gradients /= launch.num_processes if launch.zero_stage > 1 else 1
    bucket, early = launch.weight_bytes * REDUCE_BUCKET, copied if trained > REDUCE_BUCKET else 0
    if launch.device == "cpu":  # memory that is never written takes no space
        bucket, early = copied, 0
        start |= {"buffers": launch.weight_bytes * policy.head if of_head else 0}
    else:
        start |= {"buffers": bucket + early}
    if batch.accumulation > 1:
        start |= {"gradients": gradients}
    return max(start, {"buffers": bucket + copied, "gradients": gradients}, key=_sum)


def _activations(model: Model, batch: Batch, launch: Launch) -> tuple[float, float]:
    """Bytes that the layers keep for the backward pass, and additional bytes that it needs for a moment."""
    tokens = batch.prompt + batch.completion
    saved, working = model.saved(batch.rows, tokens), model.working(batch.rows, tokens)
    if not batch.checkpointing:
        return saved, working
    # The inputs of all layers, and three more tensors of this size around them; one layer at a time is complete. Autocast's
    # copies of all weights stay until the forward pass ends.
    inputs = batch.rows * tokens * model.hidden * launch.weight_bytes * (model.layers + 3)
    return inputs, max(saved / model.layers + working, model.saved.fixed)


def _logits(policy: Model, batch: Batch, launch: Launch) -> tuple[float, float]:
    """Bytes of logits and their gradient, and additional bytes that their computation needs for a moment."""
    half = 2 if launch.half else FLOAT32
    of_autocast = 2 * policy.head if launch.autocast and batch.stage != "reward" else 0  # the head's weights in bf16
    if batch.stage == "reward":
        return 0, 0
    if batch.stage == "sft":
        positions = batch.rows * batch.prompt
        tokens = min(positions, TILE_TOKENS)
        tile: float = tokens * TILE_VOCABULARY * half
        if launch.device == "cpu":  # without Triton, each of torch's operations has its own tile
            written = tokens * min(policy.vocabulary, TILE_VOCABULARY)
            tile = written * (half + FLOAT32 * TILE_COPIES)
        return of_autocast, tile + FLOAT32 * positions * policy.hidden
    numbers = batch.rows * batch.completion * policy.vocabulary
    # Under autocast, accelerate converts logits to float32, and their gradient cannot reuse their memory.
    kept = numbers * (2 * FLOAT32 if launch.autocast else half)
    return of_autocast + kept, 3 * FLOAT32 * min(numbers, CHUNK[launch.device])


def _step(policy: Model, batch: Batch, launch: Launch, value: Model | None) -> dict[str, float]:
    trained = _trained(policy, value)
    gradients: float = trained * launch.weight_bytes
    if launch.zero_stage:
        # A rank's gradients, and a flat copy of them in float32.
        gradients = 0 if launch.offload else trained * (launch.weight_bytes + FLOAT32) / launch.num_processes
    # An optimizer that is not fused has temporary copies of all parameters at once.
    fused = "fused" in batch.optimizer or "8bit" in batch.optimizer or launch.device == "cpu" or launch.offload
    copies = 0 if fused else FLOAT32 * trained / (launch.num_processes if launch.zero_stage else 1)
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
    one = whole / (2 * policy.layers)  # a layer's keys, during the copy into a longer tensor
    end = {"kv_cache": whole + one, "activations": policy.forward.fixed, "logits": logits + drawn}
    scored = {"activations": max((model.forward(min(64, batch.sampled), tokens) for model in reward_models), default=0)}
    return max(start, end, scored, key=_sum)

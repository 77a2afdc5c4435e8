"""The ranges of numbers in `trainer:` with which TRL, transformers and this project can train."""

import math
import sys
from typing import Any

RANGES = {
    "[0, inf)": "learning_rate weight_decay max_grad_norm warmup_steps label_smoothing_factor router_aux_loss_coef beta "
    "vf_coef ent_coef value_warmup_steps neftune_noise_alpha dataloader_num_workers eval_delay",
    "(0, inf)": "num_train_epochs logging_steps save_steps eval_steps adam_epsilon temperature epsilon epsilon_high "
    "cliprange_value kl_target kl_horizon lr_kl_target reward_timeout vllm_server_timeout",
    "[1, inf)": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_generations "
    "num_generations_eval num_iterations max_completion_length max_length steps_per_generation generation_batch_size "
    "sampling_batch_size ref_model_sync_steps pad_to_multiple_of save_total_limit dataset_num_proc vllm_max_model_length "
    "dataloader_prefetch_factor vllm_tensor_parallel_size",
    "[0, 1]": "gamma lam ref_model_mixup_alpha min_p",
    "[0, 1)": "adam_beta1 adam_beta2",
    "(0, 1]": "top_p vllm_gpu_memory_utilization",
}
"""Range -> the settings that must be in it. A setting that is null is not checked."""

_RANGE_OF = {name: interval for interval, names in RANGES.items() for name in names.split()}


def out_of_range(trainer: dict[str, Any]) -> list[str]:
    """Findings, each from the key on, about the numbers of a `trainer:` section."""
    found = []
    for key, value in trainer.items():
        if (number := _first_not_finite(value)) is not None:
            found.append(f"{key}: must be finite, not {number}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            interval = "[1, inf)" if key == "max_steps" and value != -1 else _RANGE_OF.get(key)
            if interval and not _is_in(value, interval):
                found.append(f"{key}: must be in {interval}, not {value}.")
    clip = trainer.get("reward_clip_range")
    if isinstance(clip, list) and not (len(clip) == 2 and clip[0] < clip[1]):
        found.append(f"reward_clip_range: must be [lowest, highest] with lowest < highest, not {clip}.")
    return found


def _is_in(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)


def _first_not_finite(value: Any) -> float | None:
    """The first number in a nested value that is NaN, infinite or too large for a float."""
    if isinstance(value, (list, dict)):
        inside = value.values() if isinstance(value, dict) else value
        return next((found for item in inside if (found := _first_not_finite(item)) is not None), None)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and (math.isnan(value) or abs(value) > sys.float_info.max) else None

"""TRL's fused LM head on a CPU."""

from trl.kernels.chunked_logprob import _use_triton
from trl.trainer import utils


def score_labels_only(prompts: bool) -> None:
    """Let the head leave out positions without a label on a CPU, too, if rows have prompts: loss and gradients stay.

    TRL scores all positions on other devices than CUDA, because some compile a program for every number of positions.
    """
    utils._use_triton = lambda device: (prompts and device.type == "cpu") or _use_triton(device)

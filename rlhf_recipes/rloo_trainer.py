"""RLOO: TRL's own algorithm on what both algorithms share."""

from rlhf_recipes.on_policy import OnPolicyTrainer


class RLOOTrainer(OnPolicyTrainer):
    """REINFORCE leave-one-out: a completion's advantage is its reward minus the mean of its prompt's other completions.

    The action is the whole completion: one ratio of summed log-probabilities per completion, clipped; the KL is summed
    over tokens and part of the reward before the baseline; advantages are not normalized. Losses, advantages and
    arguments are TRL's.

    Source: Ahmadian et al. 2024 (2402.14740), section 3.2.
    """

    _name = "RLOO"

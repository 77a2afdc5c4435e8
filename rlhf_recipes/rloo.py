"""Stage rloo: train the policy with RLOO.

    accelerate launch -m rlhf_recipes.rloo --recipe imdb_positive

Reads `data`, `reward_funcs`, `missing_eos`, `episodes` and `rloo`. Writes the trained policy and its tokenizer to
`<runs_dir>/<recipe>/rloo/`.
"""

from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    from rlhf_recipes.trainers.rloo import RLOOTrainer
    from rlhf_recipes.trainers.train import train_policy

    return train_policy(run, RLOOTrainer)


if __name__ == "__main__":
    stage_command("rloo", main)

"""Stage reinforce: train the policy with REINFORCE."""

from rlhf_recipes.runs.folder import Run
from rlhf_recipes.stage import stage_command


def main(run: Run) -> str:
    from rlhf_recipes.trainers.reinforce import ReinforceTrainer
    from rlhf_recipes.trainers.train import train_policy

    return train_policy(run, ReinforceTrainer)


if __name__ == "__main__":
    stage_command("reinforce", main)

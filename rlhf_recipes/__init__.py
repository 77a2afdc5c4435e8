"""PPO or RLOO, on your task? Recipes for RLHF on Hugging Face TRL."""

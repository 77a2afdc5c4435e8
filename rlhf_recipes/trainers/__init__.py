"""The layer on TRL: everything of TRL's and transformers' trainers that this project changes.

Each row is a method that a class overrides, or a private attribute of a library's object that is replaced (`patch`).
A test compares this table with the code.

| name | where | reason |
|---|---|---|
| `__init__` | Resumable | adds the callback that stops at a step's end |
| `train` | Resumable | refuses a checkpoint of another setup; trains no step after the last one |
| `_run_epoch` | Resumable | a run resumed at its last step has no epoch to run |
| `_save_checkpoint` | Resumable | a checkpoint is whole on all ranks, or removed; older ones go only after that |
| `_save` | Resumable | DeepSpeed's copy of the weights holds tied weights twice |
| `_save_rng_state` | Resumable | adds the sums since the last log line, on every rank |
| `_load_rng_state` | Resumable | loads them; it runs when the resumed loop reaches the checkpoint's step |
| `__init__` | OnPolicyTrainer | reward functions are checked; the reference of a model instance is its copy |
| `_generate_and_score_completions` | OnPolicyTrainer | KL, scores and advantages are ours; the batch keeps log-probabilities per token |
| `_generate` | OnPolicyTrainer | decodes completions together with their prompt |
| `_generate_single_turn` | OnPolicyTrainer | samples without left padding, and in parts |
| `_calculate_rewards` | OnPolicyTrainer | says which completions are finished; an error on one rank stops all |
| `_get_per_token_logps_and_entropies` | OnPolicyTrainer | positions are those of sampling; keeps entropies and values |
| `compute_loss` | OnPolicyTrainer | TRL's logs a row for each micro-batch |
| `_get_train_sampler` | OnPolicyTrainer | an epoch's order depends on seed and epoch only, so that resume is exact |
| `_prepare_inputs` | OnPolicyTrainer | batches of one length; PPO draws them again in each pass; resume within a rollout |
| `evaluate` | OnPolicyTrainer | has random numbers of its own |
| `log` | OnPolicyTrainer | one set of metric names; means over tokens, not over micro-batches |
| `_save_checkpoint` | OnPolicyTrainer | time spent saving counts for no phase |
| `_save_rng_state` | OnPolicyTrainer | adds rollout, KL control, beta, metrics and logs, on every rank |
| `_load_rng_state` | OnPolicyTrainer | loads them |
| `__init__` | PPOTrainer | takes `value_model` |
| `_compute_loss` | PPOTrainer | PPO's loss |
| `_save` | PPOTrainer | the value network has a folder of its own |
| `_load_from_checkpoint` | PPOTrainer | loads it from there |
| `_load_best_model` | PPOTrainer | loads it from there |
| `_compute_loss` | RLOOTrainer | RLOO's loss |
| `_iter_named_params` | patch | vLLM gets the policy without value network and with exact adapters; TRL has no hook |
| `_last_lr` | patch | torch's scheduler has no way to scale its learning rate |
| `_n_gpu` | patch | transformers would spread one process over all GPUs |
"""

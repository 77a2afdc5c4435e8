"""The layer on TRL: the changes to the trainers of TRL and transformers.

A row is a method that a class overrides, or a private attribute of a library's object that is replaced (`patch`).
A test compares this table with the code.

| name | where | reason |
|---|---|---|
| `__init__` | Resumable | adds the callback that stops after a step |
| `train` | Resumable | refuses a checkpoint of another setup; trains no step after the last |
| `_run_epoch` | Resumable | a run resumed at its last step runs no epoch |
| `training_step` | Resumable | adds up the loss of an optimizer step |
| `_get_grad_norm` | Resumable | stops before a step whose loss or gradient is not finite |
| `_save_checkpoint` | Resumable | a checkpoint is complete on all ranks, or removed; only then are older ones removed |
| `_save` | Resumable | DeepSpeed's copy of the weights has tied weights twice |
| `_save_rng_state` | Resumable | adds the sums since the last log line, on every rank |
| `_load_rng_state` | Resumable | loads these sums when the resumed loop reaches the checkpoint's step |
| `__init__` | OnPolicyTrainer | checks reward functions; the reference of a model instance is a copy of it |
| `_generate_and_score_completions` | OnPolicyTrainer | computes KL, scores and advantages; log-probabilities are per token |
| `_generate` | OnPolicyTrainer | decodes a completion together with its prompt |
| `_generate_single_turn` | OnPolicyTrainer | samples without left padding, and in parts |
| `_calculate_rewards` | OnPolicyTrainer | says which completions are finished; an error on one rank stops all ranks |
| `_get_per_token_logps_and_entropies` | OnPolicyTrainer | has the positions of sampling; keeps entropies and values |
| `compute_loss` | OnPolicyTrainer | TRL logs a row for each micro-batch |
| `_get_train_sampler` | OnPolicyTrainer | an epoch's order depends on seed and epoch only, so that resume is exact |
| `_get_train_sampler` | Resumable | group_by_length draws the orders of all epochs from one generator; resume is exact |
| `_prepare_inputs` | OnPolicyTrainer | rows of similar length; PPO shuffles before each pass; resume within a rollout |
| `evaluate` | OnPolicyTrainer | has its own random numbers |
| `log` | OnPolicyTrainer | one set of metric names; means over tokens, not over micro-batches |
| `_save_checkpoint` | OnPolicyTrainer | the time counts for no phase |
| `_save_rng_state` | OnPolicyTrainer | adds rollout, KL control, beta, metrics and logs, on every rank |
| `_load_rng_state` | OnPolicyTrainer | loads these |
| `__init__` | PPOTrainer | takes `value_model` |
| `_compute_loss` | PPOTrainer | PPO's loss |
| `_save` | PPOTrainer | the value network has its own folder |
| `_load_from_checkpoint` | PPOTrainer | loads the value network |
| `_load_best_model` | PPOTrainer | loads the value network |
| `_compute_loss` | RLOOTrainer | RLOO's loss |
| `_iter_named_params` | patch | vLLM gets the policy without value network, with exact adapters; TRL has no hook |
| `_last_lr` | patch | torch's scheduler cannot scale its learning rate |
| `_use_triton` | patch | on a CPU, TRL's head of stage sft scores prompts and padding, too |
| `_n_gpu` | patch | transformers would use all GPUs in one process |
"""

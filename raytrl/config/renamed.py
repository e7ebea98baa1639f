"""The answer to an unknown key: the nearest known one, or today's name of an old one."""

import difflib
from collections.abc import Iterable

# Names that people paste from older TRL, transformers and PEFT examples → where the setting is in a run file.
RENAMED = {
    "max_seq_length": "training.max_length",
    "tokenizer": "model.tokenizer",
    "processing_class": "model.tokenizer",
    "dataset_text_field": "training.dataset_text_field",
    "evaluation_strategy": "training.eval_strategy",
    "eval_strategy": "training.eval_strategy",
    "no_cuda": "training.use_cpu",
    "per_gpu_train_batch_size": "training.per_device_train_batch_size",
    "per_gpu_eval_batch_size": "training.per_device_eval_batch_size",
    "warmup_ratio": "training.warmup_steps (a value below 1 is a share of all steps)",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "training.model_init_kwargs.attn_implementation",
    "peft_config": "lora",
    "use_peft": "lora (the section's presence turns it on)",
    "lora_r": "lora.r",
    "lora_dropout": "lora.lora_dropout",
    "lora_target_modules": "lora.target_modules",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "load_in_4bit": "training.model_init_kwargs.quantization_config",
    "load_in_8bit": "training.model_init_kwargs.quantization_config",
    "chat_template": "training.chat_template_path",
    "num_workers": "learner.workers",
    "use_gpu": "learner.resources: {GPU: 1}",
    "max_prompt_length": "training.max_length",
}

# Names of TRL's PPO trainers, the one of 1.12 and the one of 0.11, and of its GRPOConfig and RLOOConfig → where the setting
# is in a PPO run file.
RENAMED_PPO = {
    "total_episodes": "ppo.steps (total_episodes / ppo.batch_size)",
    "num_ppo_epochs": "ppo.epochs",
    "ppo_epochs": "ppo.epochs",
    "num_mini_batches": "ppo.minibatches",
    "mini_batch_size": "ppo.minibatches (how many, not how large)",
    "per_device_train_batch_size": "ppo.batch_size (of all workers together)",
    "gradient_accumulation_steps": "ppo.max_tokens_per_microbatch",
    "local_rollout_forward_batch_size": "rollout.chunk_prompts",
    "response_length": "rollout.sampling.max_new_tokens",
    "temperature": "rollout.sampling.temperature",
    "stop_token": "rollout.sampling.stop (the end token ends a response anyway)",
    "max_prompt_length": "rollout.max_prompt_length",
    "kl_coef": "ppo.kl.coef",
    "init_kl_coef": "ppo.kl.coef",
    "adap_kl_ctrl": "ppo.kl.target (set: adaptive)",
    "kl_estimator": "nothing: the reward holds k1; k3 there drives the policy away from the optimum",
    "cliprange": "ppo.clip_range",
    "cliprange_value": "ppo.value_clip_range",
    "vf_coef": "ppo.value_coef",
    "whiten_rewards": "nothing: whitened rewards have another optimum; ppo.whiten_advantages has not",
    "use_score_scaling": "ppo.reward_scaling",
    "score_clip": "ppo.reward_clip",
    "lr_scheduler_type": "ppo.lr_schedule",
    "num_sample_generations": "rollout.samples",
    "lora_dropout": "nothing: no forward pass of PPO has dropout",
    "sft_model_path": "model.path",
    "reward_model_path": "reward.sources (a list of {name, model})",
    "reward_model": "reward.sources (a list of {name, model})",
    "reward_funcs": "reward.sources (a list of {name, function: file.py:name})",
    "ref_model": "reference.path",
    "environment_factory": "rollout.environment (file.py:Class, or {name: file.py:Class})",
    "max_tool_calling_iterations": "rollout.max_turns",
    "rollout_func": "rollout.environment or rollout.tools: a function that is given TRL's trainer cannot be taken",
    "num_generations": "ppo.responses_per_prompt",
    "max_completion_length": "rollout.sampling.max_new_tokens",
    "beta": "ppo.kl.coef (with ppo.kl.place: loss for GRPO, reward for RLOO)",
    "num_iterations": "ppo.epochs",
    "steps_per_generation": "ppo.minibatches (times the accumulation steps)",
    "generation_batch_size": "ppo.batch_size",
    "max_steps": "ppo.steps (a step is a batch of responses, not an optimizer step)",
    "epsilon": "ppo.clip_range",
    "epsilon_high": "ppo.clip_range_high (with ppo.loss: cispo it is ppo.ratio_limit)",
    "delta": "ppo.ratio_limit",
    "importance_sampling_level": "ppo.ratio",
    "scale_rewards": "ppo.advantage_scale",
    "loss_type": "ppo.algorithm, or ppo.loss_mean (dapo: tokens, grpo: responses, dr_grpo: max_tokens)",
    "mask_truncated_completions": "ppo.train_unfinished (with the opposite value)",
    "reward_weights": "reward.sources (each with a weight)",
    "normalize_advantages": "ppo.whiten_advantages",
    "reward_clip_range": "ppo.reward_clip (one number, to both sides)",
    "advantage_estimator": "ppo.algorithm",
    "kl_in_reward": "ppo.kl.place",
    "vllm_importance_sampling_correction": "ppo.importance (null: none)",
    "vllm_importance_sampling_mode": "ppo.importance.level and ppo.importance.mode",
    "vllm_importance_sampling_clip_max": "ppo.importance.high",
    "vllm_importance_sampling_clip_min": "ppo.importance.low",
    "vllm_importance_sampling_cap": "ppo.importance.high",
    "importance_cap": "ppo.importance.high",
    "use_bias_correction_kl": "nothing: the KL in the loss always has its ratio; without, it would be the forward KL",
    "disable_dropout": "nothing: no forward pass of PPO has dropout",
    "top_p": "nothing: the learner's probabilities are those of the whole distribution",
    "top_k": "nothing: the learner's probabilities are those of the whole distribution",
    "min_p": "nothing: the learner's probabilities are those of the whole distribution",
    "repetition_penalty": "nothing: the learner's probabilities are those of the whole distribution",
    "top_entropy_quantile": "nothing: not offered",
    "entropy_coef": "nothing: not offered",
    "multi_objective_aggregation": "nothing: weighted scores are summed, then compared",
    "off_policy_mask_threshold": "nothing: not offered",
    "sync_ref_model": "nothing: the reference stays what it was",
    "use_vllm": "rollout.engine: vllm",
    "vllm_mode": "rollout.engine: vllm (its actors share a GPU where their resources are parts of one)",
    "vllm_gpu_memory_utilization": "rollout.engine_args (gpu_memory_utilization in it)",
}

# Those of the first table that hold for PPO too.
_SHARED = {old: today for old, today in RENAMED.items() if not today.startswith("training.") and old not in RENAMED_PPO}

# Fields of TRL's config classes that a run file sets elsewhere, because Ray Train owns what they govern.
OWNED = {
    "output_dir": "`output_dir` and `name` at the top of the file",
    "seed": "`seed` at the top of the file",
    "run_name": "`name` at the top of the file",
    "report_to": "`report_to` at the top of the file",
    "deepspeed": "`learner.deepspeed`",
    "fsdp": "`learner.deepspeed` (raytrl distributes with DDP or DeepSpeed)",
    "fsdp_config": "`learner.deepspeed` (raytrl distributes with DDP or DeepSpeed)",
    "local_rank": "`learner.workers` (Ray Train places the ranks)",
    "ddp_backend": "`learner.resources` (NCCL with GPUs, gloo without)",
    "save_strategy": "`checkpoint.every`",
    "save_steps": "`checkpoint.every`",
    "save_total_limit": "`checkpoint.keep`",
    "save_on_each_node": "`checkpoint` (each file is stored once)",
    "save_only_model": "`checkpoint` (a checkpoint must be complete to be resumed from)",
    "resume_from_checkpoint": "nothing: the same command continues a run; --fresh starts anew",
    "restore_callback_states_from_checkpoint": "nothing: the same command continues a run",
    "ignore_data_skip": "nothing: a resumed run continues at its exact data position",
    "overwrite_output_dir": "the option --fresh",
    "enable_jit_checkpoint": "`checkpoint.every`",
    "do_train": "the command: `raytrl sft|reward|dpo` trains",
    "do_eval": "`data.eval`: its presence evaluates",
    "do_predict": "the command `raytrl eval`",
    "push_to_hub": "nothing: the result is the folder model/; push it with `raytrl push`",
    "load_best_model_at_end": "nothing: the result is the model after the last step; use `checkpoint.keep` to keep more",
    "auto_find_batch_size": "`per_device_train_batch_size`: a batch size that changes on the way cannot be resumed",
    "disable_tqdm": "nothing: raytrl draws its own progress",
    "trust_remote_code": "`model.trust_remote_code`",
    "use_cpu": "`learner.resources`: a worker without GPU trains on its CPU",
    "log_level": "the option --debug",
    "log_level_replica": "the option --debug",
}


def unknown_key(where: str, key: str, known: Iterable[str], kind: str = "sft") -> str:
    """One line that names an unknown key and what was probably meant in a run file of this kind."""
    path = f"{where}.{key}" if where else key
    today = (RENAMED_PPO | _SHARED if kind == "ppo" else RENAMED).get(key, path)
    if today != path:
        return f"{path}: unknown key; today this is {today}"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"{path}: unknown key" + (f"; nearest known key: {near[0]}" if near else f"; known: {_some(known)}")


def _some(known: Iterable[str]) -> str:
    names = sorted(known)
    return ", ".join(names) if len(names) <= 12 else ", ".join(names[:12]) + ", …"

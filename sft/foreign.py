"""What other trainers call things, and what they are called here.

Names come from transformers' and TRL's argument classes, axolotl, LLaMA-Factory, torchtune and PEFT. Each is answered
with our key and, where the meaning differs, the difference in one sentence: a key that is merely renamed can still
train something else.
"""

from __future__ import annotations

_STEP = "it counts conversations an optimizer step sees over all devices: per-device batch x accumulation x devices"
_MICRO = "tokens, not rows, in one forward pass; results do not depend on it, and 'auto' measures it"
_PACKING = "there is nothing to set: examples always lie joined without padding, never see each other, and batches stay"
_LAYOUT = "the launcher says it: accelerate launch --config_file configs/accelerate/fsdp2.yaml -m sft train CONFIG"

# ours (empty: there is no key) -> (their names, how it differs)
_NAMES: dict[str, tuple[str, str]] = {
    "model.name": (
        "model_name_or_path model_id model_path base_model pretrained_model_name_or_path checkpointer model_name "
        "tokenizer_name_or_path tokenizer",
        "hub id, folder or .gguf file; the tokenizer comes with it",
    ),
    "model.revision": ("model_revision revision_of_model", ""),
    "model.tuning": (
        "finetuning_type use_peft use_lora adapter_type load_in_4bit load_in_8bit quantization_bit use_qlora peft",
        "full, lora or qlora; qlora loads the base in 4 bits",
    ),
    "model.adapter": ("adapter_name_or_path lora_model_dir adapter_path peft_model", ""),
    "model.lora.rank": ("lora_r lora_rank r", ""),
    "model.lora.alpha": ("lora_alpha", ""),
    "model.lora.dropout": ("lora_dropout", ""),
    "model.lora.targets": (
        "lora_target_modules lora_target lora_target_linear target_modules lora_attn_modules apply_lora_to_mlp",
        "all-linear, a list of module names, or a regular expression",
    ),
    "model.lora.modules_to_save": ("lora_modules_to_save additional_target lora_additional_target", ""),
    "model.lora.rslora": ("use_rslora peft_use_rslora lora_use_rslora", ""),
    "model.lora.dora": ("use_dora peft_use_dora lora_use_dora", ""),
    "model.lora.init": ("init_lora_weights peft_init_lora_weights pissa_init", ""),
    "model.quantization.type": ("bnb_4bit_quant_type quantization_method", "read with model.tuning: qlora"),
    "model.quantization.double_quant": ("bnb_4bit_use_double_quant double_quantization use_double_quant", ""),
    "model.precision": (
        "bf16 fp16 tf32 dtype torch_dtype mixed_precision bfloat16 float16 pure_bf16 bnb_4bit_compute_dtype fp8",
        "auto, bf16, mixed (float32 weights, bf16 computation) or fp32; float16 is not offered",
    ),
    "model.attention": (
        "attn_implementation flash_attention flash_attn sdp_attention xformers_attention flex_attention "
        "eager_attention use_flash_attention_2",
        "auto takes the fastest one that proves equal on this model",
    ),
    "model.gradient_checkpointing": ("enable_activation_checkpointing activation_checkpointing use_reentrant", ""),
    "model.compile": ("torch_compile", ""),
    "model.trust_remote_code": ("trust_remote_code_model", ""),
    "data.train": (
        "dataset datasets dataset_name dataset_path dataset_dir "
        "train_file train_dataset data_files train_data data_path",
        "a list of sources, e.g. data.train: [{path: data/chats.jsonl}]",
    ),
    "data.eval": (
        "val_set_size test_datasets eval_dataset validation_file val_size validation_split eval_split test_size "
        "dataset_val dataset_test_split do_eval",
        "below 1 a share of train, a whole number that many rows, or a list of sources",
    ),
    "data.template": (
        "chat_template chat_template_path chat_template_jinja chat_template_name prompt_template prompt_style",
        "model (its own), chatml, chatml-tools, zephyr, tulu, or a path to a .jinja file",
    ),
    "data.template_args": ("chat_template_kwargs enable_thinking default_system", "given to the chat template"),
    "data.reasoning": (
        "train_on_reasoning mask_thinking mask_reasoning split_thinking",
        "train, context, drop or close; null leaves it to the template",
    ),
    "data.train_on": (
        "train_on_inputs train_on_input assistant_only_loss completion_only_loss "
        "train_on_prompt mask_history roles_to_train "
        "train_on_eos train_on_eot train_on_responses_only masking_strategy train_on_last_turn",
        "auto, assistant, last_assistant, completion or all; the stop token is always trained",
    ),
    "data.max_tokens": (
        "cutoff_len max_seq_length max_length sequence_len max_seq_len "
        "model_max_length context_length seq_length seq_len",
        "of one example; what is longer is dropped and counted unless data.over_long says otherwise",
    ),
    "data.over_long": (
        "truncation truncation_mode excess_length_strategy sequence_len_overflow_handling",
        "drop, keep_turns, truncate or error",
    ),
    "data.train.0.limit": ("max_samples max_train_samples num_samples", "of one source"),
    "data.train.0.repeat": (
        "interleave_probs dataset_weights mix_strategy",
        "how often a source's rows come in an epoch",
    ),
    "data.train.0.columns": (
        "dataset_text_field column_map field_messages conversation_column message_property_mappings",
        "{their name: ours}",
    ),
    "batch.examples": (
        "per_device_train_batch_size train_batch_size batch_size global_batch_size gradient_accumulation_steps "
        "gradient_accumulation total_batch_size effective_batch_size",
        _STEP,
    ),
    "batch.micro_tokens": (
        "micro_batch_size per_device_eval_batch_size eval_batch_size max_tokens_per_batch auto_find_batch_size "
        "max_tokens_per_gpu tokens_per_batch",
        _MICRO,
    ),
    "optim.type": ("optim_type optimizer optimizer_name", "adamw, adamw_8bit or paged_adamw_8bit"),
    "optim.lr": ("learning_rate base_lr", "auto is 2e-4 for lora and qlora, 2e-5 for full"),
    "optim.schedule": ("lr_scheduler_type lr_scheduler scheduler", "cosine, linear, constant or wsd"),
    "optim.min_lr_ratio": ("cosine_min_lr_ratio min_lr lr_scheduler_kwargs min_lr_rate", "as a share of optim.lr"),
    "optim.warmup": (
        "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps",
        "below 1 a share of the run, else steps",
    ),
    "optim.weight_decay": ("wd l2", ""),
    "optim.betas": ("adam_beta1 adam_beta2 beta1 beta2", "both in one list: [0.9, 0.999]"),
    "optim.eps": ("adam_epsilon adam_eps epsilon", ""),
    "optim.max_grad_norm": (
        "clip_grad_norm gradient_clipping grad_clip max_norm gradient_clip_val",
        "0 switches it off",
    ),
    "train.epochs": ("num_train_epochs num_epochs epoch max_epochs", ""),
    "train.max_steps": ("max_train_steps total_steps num_steps max_steps_per_epoch", ""),
    "train.early_stopping": ("early_stopping_patience", "a section: {metric: eval.loss, patience: 3}"),
    "train.neftune_alpha": ("neftune_noise_alpha", ""),
    "run.dir": ("output_dir save_dir run_dir checkpoint_dir out_dir", "runs/<name of the config file> by default"),
    "run.seed": ("data_seed random_seed", ""),
    "run.deterministic": ("full_determinism cudnn_deterministic_mode", ""),
    "eval.every": (
        "eval_steps evals_per_epoch eval_strategy evaluation_strategy "
        "run_val_every_n_steps eval_on_start eval_interval",
        "below 1 a share of the run, else steps; the start and the end are always evaluated",
    ),
    "eval.samples": ("eval_sample_generations eval_table_size num_eval_samples", ""),
    "save.every": (
        "save_steps saves_per_epoch save_strategy save_interval checkpointing_steps",
        "below 1 a share of the run, else steps",
    ),
    "save.keep": ("save_total_limit keep_last_n_checkpoints", ""),
    "save.best": ("load_best_model_at_end metric_for_best_model save_best", "name the metric: eval.loss"),
    "log.every": ("logging_steps log_every_n_steps logging_strategy log_interval logging_first_step", "steps"),
    "log.trackers": (
        "report_to use_wandb use_tensorboard use_mlflow metric_logger wandb tensorboard logger",
        "a list: tensorboard, wandb, mlflow, trackio",
    ),
    "log.project": ("wandb_project project_name trackio_project mlflow_experiment_name", ""),
    "log.name": ("run_name wandb_name wandb_run_name experiment_name", ""),
}

_WITHOUT_KEY: tuple[tuple[str, str], ...] = (
    (
        "packing sample_packing eval_packing pad_to_sequence_len group_by_length padding_free neat_packing "
        "packed pad_to_multiple_of train_sampling_strategy multipack_real_batches packing_strategy "
        "eval_sample_packing",
        _PACKING,
    ),
    (
        "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir resume ignore_data_skip",
        "there is nothing to set: the same command on the same run.dir resumes; sft train CONFIG --fresh starts over",
    ),
    (
        "fsdp fsdp_config deepspeed fsdp_version tensor_parallel_size context_parallel_size "
        "ddp_find_unused_parameters dp_shard_size num_processes num_gpus",
        _LAYOUT,
    ),
    (
        "stage do_train trainer rl loss_type task_type",
        "all training is supervised finetuning: sft train CONFIG",
    ),
    (
        "dataloader_num_workers dataset_num_proc preprocessing_num_workers dataset_processes num_workers "
        "dataloader_pin_memory overwrite_cache dataset_prepared_path streaming dataset_batch_size",
        "there is nothing to set: data is prepared once into a cache keyed by its content",
    ),
    (
        "shuffle shuffle_dataset seed_dataset sampler",
        "there is nothing to set: the order is a function of run.seed and the epoch",
    ),
    (
        "use_liger_kernel liger_kernel use_cce chunk_size_feed_forward enable_liger_kernel activation_offloading",
        "there is nothing to set: logits are made for trained tokens only, and in chunks; on CUDA by Liger's kernel "
        "where liger-kernel is installed",
    ),
    (
        "special_tokens eos_token pad_token bos_token added_tokens add_special_tokens resize_vocab eos_token_id",
        "there is nothing to set: the template's stop token is found and proven, and tokens it lacks are added",
    ),
    (
        "hub_model_id push_to_hub hub_token hub_strategy export_dir",
        "it comes after training: sft export RUN --out DIR --push REPO",
    ),
    (
        "merge_lora lora_on_cpu export_size",
        "it comes after training: sft export RUN --out DIR --merge",
    ),
)


def _by_their_name() -> dict[str, tuple[str, str]]:
    table = {name: (ours, why) for ours, (names, why) in _NAMES.items() for name in names.split()}
    table.update({name: ("", why) for names, why in _WITHOUT_KEY for name in names.split()})
    return table


FOREIGN = _by_their_name()
"""Their name -> (our dotted key or "", how it differs or "")."""


def answer(name: str) -> str:
    """One sentence on what another trainer's `name` is here, or an empty string."""
    ours, why = FOREIGN.get(name.lower().replace("-", "_").lstrip("_"), ("", ""))
    if not ours:
        return f" That is another trainer's; here {why}." if why else ""
    return f" Here it is '{ours}'" + (f": {why}." if why else ".")

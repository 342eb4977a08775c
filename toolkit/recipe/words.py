"""The words of other tools, and what is said to someone who uses one: what it is called here, or why there is no key.

They come from LLaMA-Factory, Axolotl, TRL, transformers, PEFT, mergekit, X-LoRA and scikit-learn; they are compared in
lower case with `_` for `-`.
"""

from collections.abc import Mapping

# Key here: the words for it elsewhere.
CALLED: Mapping[str, str] = {
    "name": "output_dir run_name experiment_name project_name output out_dir 이름",
    "task": "task_type stage 과제",
    "base.model": (
        "model_name_or_path base_model pretrained_model_name_or_path base_model_name_or_path model_id model_name "
        "model_path checkpoint pretrained base_model_config 모델"
    ),
    "base.revision": "model_revision revision_of_model base_model_revision",
    "base.quantize": (
        "load_in_4bit quantization_bit quantization_method quantization bnb_4bit_quant_type bits "
        "bnb_4bit_compute_dtype bnb_4bit_use_double_quant double_quantization bnb_config quantization_config"
    ),
    "base.trust_remote_code": "remote_code allow_remote_code",
    "data.train": (
        "dataset datasets train_file train_files dataset_name dataset_path data_path train_dataset data_files "
        "training_data train_data files 학습데이터 데이터"
    ),
    "data.valid": (
        "val_set_size val_size validation_split eval_dataset validation_file valid_file val_file test_datasets dev "
        "validation val eval_split eval_file"
    ),
    "data.test": "test_size test_file test_split test_dataset",
    "data.format": "dataset_format formatting prompt_style chat_format data_format type_of_dataset",
    "data.system": "system_prompt default_system system_message 시스템",
    "data.clean.near_duplicates": "dedup_threshold minhash_threshold near_dedup",
    "data.clean.duplicates": "dedup deduplicate",
    "data.clean.too_long": "truncation truncation_strategy excess_length_strategy truncation_mode truncation_side",
    "adapter": "peft_config lora_config lora peft lora_parameters",
    "adapter.kind": (
        "finetuning_type peft_type tuning_type method adapter_type train_type peft_method use_peft use_lora"
    ),
    "adapter.rank": "r lora_r lora_rank lora_dim rank_dimension low_rank_dimension rank_r 랭크",
    "adapter.alpha": "lora_alpha scaling lora_scale scale",
    "adapter.dropout": "lora_dropout adapter_dropout",
    "adapter.targets": (
        "target_modules lora_target lora_target_modules lora_target_linear modules target_module lora_modules_to_target"
    ),
    "adapter.rank_stabilised": "use_rslora rslora rank_stabilized peft_use_rslora",
    "adapter.dora": "use_dora peft_use_dora",
    "adapter.init": "init_lora_weights pissa_init peft_init_lora_weights pissa",
    "adapter.tokens": "num_virtual_tokens prefix_length pre_seq_len n_tokens virtual_tokens prefix_tokens",
    "adapter.projection": "prefix_projection",
    "adapter.init_text": "prompt_tuning_init_text prefix_init_text",
    "adapter.layers": "layers_to_transform intervention_layers",
    "train.epochs": "num_train_epochs num_epochs n_epochs epoch max_epochs 에폭",
    "train.max_steps": "max_train_steps total_steps n_steps iters iterations",
    "train.batch_size": "global_batch_size effective_batch_size train_batch_size total_batch_size 배치",
    "train.micro_batch": (
        "per_device_train_batch_size micro_batch_size per_gpu_train_batch_size device_batch_size "
        "micro_batch_per_device auto_find_batch_size"
    ),
    "train.learning_rate": "lr base_lr peak_lr max_lr 학습률",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule scheduler_type lr_decay_style",
    "train.warmup_ratio": "warmup_steps warmup num_warmup_steps lr_warmup_steps warmup_fraction",
    "train.optimizer": "optim optimizer_type use_muon optimizer_name",
    "train.weight_decay": "wd decay",
    "train.max_grad_norm": "gradient_clipping clip_grad grad_clip max_norm gradient_clip_val grad_norm",
    "train.precision": (
        "bf16 fp16 fp32 tf32 mixed_precision dtype torch_dtype pure_bf16 bfloat16 float16 amp model_dtype"
    ),
    "train.activation_checkpointing": (
        "gradient_checkpointing use_gradient_checkpointing grad_checkpointing disable_gradient_checkpointing "
        "activation_offloading gradient_checkpointing_kwargs"
    ),
    "train.packing": "sample_packing neat_packing pack_sequences padding_free eval_sample_packing packing_strategy",
    "train.max_length": (
        "cutoff_len sequence_len max_seq_length max_seq_len seq_len block_size model_max_length "
        "max_sequence_length sequence_length maximum_length context_length"
    ),
    "train.evaluate_every": (
        "eval_steps evals_per_epoch eval_strategy evaluation_strategy eval_every eval_interval eval_frequency "
        "val_check_interval do_eval"
    ),
    "train.early_stop_patience": "early_stopping_patience patience early_stopping",
    "train.keep": "save_total_limit keep_checkpoints",
    "train.seed": "random_seed random_state data_seed 시드",
    "search": "hyperparameter_search hpo sweep optuna tune 탐색",
    "search.sampler": "search_algorithm search_alg sampling_method",
    "search.pruner": "pruning early_terminate hpo_scheduler",
    "search.trials": "n_trials num_trials max_trials num_samples run_cap",
    "search.minutes": "timeout time_budget max_minutes time_limit",
    "search.space": "hp_space search_space param_space hyperparameters parameters",
    "search.storage": "storage_url study_storage",
    "search.workers": "n_jobs num_search_workers",
    "experts": "adapters adapter_name_or_path lora_adapters models expert_models estimators expert 전문가",
    "combine": (
        "moe mixture_of_experts mixture ensemble merge merging combination merge_config xlora_config ensembling "
        "router_config bagging boosting mixing routing 병합 앙상블 조합"
    ),
    "combine.method": "merge_method combination_type merge_strategy merging_method merge_type majority_sign_method",
    "combine.weights": "adapter_weights expert_weights merge_weights member_weights lora_weights voting_weights",
    "combine.rank": "svd_rank merge_rank",
    "combine.density": "drop_rate drop_p sparsity prune_ratio",
    "combine.top_k": "top_k_lora num_experts_per_tok moe_topk top_k_experts num_selected_experts",
    "combine.router": "router_type routing_method routing_strategy gate_mode",
    "combine.encoder": "embedding_model sentence_transformer router_model",
    "combine.default": "fallback default_expert default_adapter",
    "combine.hidden": "xlora_size router_hidden_size gate_hidden",
    "combine.per": "layerwise_scalings",
    "combine.balance": "router_aux_loss_coef moe_aux_loss_coef aux_loss_coef load_balancing_loss balance_loss",
    "combine.members": "n_estimators n_members num_members n_models ensemble_size",
    "combine.rounds": "n_rounds num_rounds boosting_rounds num_boost_round",
    "combine.how": "voting vote_type",
    "evaluate.prompts": "eval_prompts test_prompts sample_prompts",
    "evaluate.metrics": "metric_names eval_metrics compute_metrics",
    "track": (
        "report_to logger loggers use_wandb wandb_project wandb_entity wandb_run_id wandb_name wandb "
        "use_tensorboard tensorboard wandb_log_model use_swanlab trackio_space_id tracker log_with"
    ),
    "serve.max_tokens": "max_new_tokens max_completion_tokens num_predict max_gen_len",
    "serve.temperature": "temp",
}

# What is worth knowing besides the name.
ALSO: Mapping[str, str] = {
    "output_dir": "The run goes to runs/NAME",
    "load_in_4bit": "Write quantize: nf4",
    "quantization_bit": "Write quantize: nf4 for 4 bits; 8 bits are not offered",
    "dataset": "A list of files",
    "datasets": "A list of files; their shape goes to data.format",
    "lora_target_linear": "Write targets: all-linear",
    "micro_batch_size": "Leave it auto: train.batch_size counts conversations per optimizer step",
    "per_device_train_batch_size": "Leave it auto: train.batch_size counts conversations per optimizer step",
    "warmup_steps": "A share of all steps, as in 0.05",
    "warmup": "A share of all steps, as in 0.05",
    "eval_steps": "In epochs, as in 0.25",
    "eval_strategy": "In epochs, as in 0.25",
    "evals_per_epoch": "The other way round: in epochs, as in 0.25 for four",
    "bf16": "Write precision: bf16, or leave it auto",
    "fp16": "Write precision: fp16, or leave it auto",
    "wandb_project": "Write track: [wandb]; the project is the environment variable WANDB_PROJECT",
    "report_to": "A list, as in [tensorboard]",
    "save_total_limit": "Old checkpoints go by themselves; keep lists the steps whose checkpoints stay",
    "use_rslora": "Write rank_stabilised: true",
    "adapters": "Several, each by its name; one alone is adapter",
    "moe": "Write combine: {kind: gate}: frozen experts, weighed for every token",
    "mixture_of_experts": "Write combine: {kind: gate}: frozen experts, weighed for every token",
    "xlora_config": "Write combine: {kind: gate}",
    "models": "A map of names: {polite: {data: {train: […]}}, old: {run: runs/old}}",
    "adapter_name_or_path": "A map of names; one that exists is {run: FOLDER}",
    "merge": "Write combine: {kind: merge}",
    "ensemble": "Write combine: {kind: vote}, or bag or boost",
    "bagging": "Write combine: {kind: bag}",
    "boosting": "Write combine: {kind: boost}",
    "drop_rate": "The share that is kept: 1 - drop rate",
    "drop_p": "The share that is kept: 1 - drop rate",
    "sparsity": "The share that is kept: 1 - sparsity",
    "layerwise_scalings": "Write per: layer, or per: model",
    "adapter_type": "One of lora, prefix, reft, embedding, full, or a kind of PEFT",
}

# Words for which there is no key, by the reason.
REMOVE: Mapping[str, str] = {
    "it is worked out: train.batch_size counts conversations per optimizer step over all devices": (
        "gradient_accumulation_steps gradient_accumulation accumulation_steps grad_accum accumulate_grad_batches "
        "gradient_accumulation_iters"
    ),
    "checkpoints are written by time, so that a killed run repeats at most 30 seconds": (
        "save_steps save_strategy saves_per_epoch save_every save_interval save_only_model save_safetensors "
        "checkpointing_steps save_frequency"
    ),
    "every step is written to metrics.jsonl": (
        "logging_steps log_steps logging_strategy logging_dir log_interval log_every logging_first_step plot_loss "
        "log_level disable_tqdm log_freq"
    ),
    "the base's own chat template is used, or ours where it has none": (
        "template chat_template chat_template_path chat_template_jinja prompt_template conversation_template "
        "default_chat_template custom_chat_template special_tokens"
    ),
    "the same command goes on where it stopped": (
        "resume_from_checkpoint auto_resume_from_checkpoints resume resume_training ignore_data_skip"
    ),
    "the command never overwrites a run; --fresh moves the old one aside": (
        "overwrite_output_dir overwrite overwrite_cache"
    ),
    "only what the assistant says is learned, always": (
        "train_on_inputs assistant_only_loss completion_only_loss mask_inputs train_on_prompt mask_history "
        "roles_to_train train_on_responses_only train_on_input"
    ),
    "several processes are started by torchrun; a recipe says nothing about them": (
        "deepspeed fsdp fsdp_config ddp ddp_timeout num_processes tensor_parallel_size local_rank "
        "ddp_find_unused_parameters devices num_gpus n_gpu use_fsdp"
    ),
    "the device is found when the run starts": "device device_map use_cpu no_cuda use_mps gpu_ids accelerator cuda",
    "the fastest attention that is exact is chosen": (
        "attn_implementation flash_attention flash_attn use_flash_attention_2 xformers_attention sdp_attention "
        "flash_attention_2 use_flash_attn eager_attention"
    ),
    "the tokenizer comes with the base": (
        "tokenizer tokenizer_type tokenizer_name tokenizer_name_or_path tokenizer_config use_fast_tokenizer "
        "tokenizer_use_fast resize_token_embeddings_to_multiple_of pad_token eos_token add_special_tokens"
    ),
    "the base's own config says what it is": (
        "model_type is_llama_derived_model is_mistral_derived_model model_config is_qwen_derived_model "
        "rope_scaling low_cpu_mem_usage"
    ),
    "rows are read and rendered as they are needed": (
        "dataset_dir dataset_prepared_path preprocessing_num_workers dataset_num_proc dataloader_num_workers "
        "dataset_processes remove_unused_columns streaming buffer_size cache_dir dataloader_pin_memory "
        "shuffle_merged_datasets dataset_kwargs max_samples num_proc num_workers"
    ),
    "8-bit bases are not offered; base.quantize: nf4 is": "load_in_8bit int8 use_8bit",
    "name the shape in data.format: columns with user and assistant, or labels with text and label": (
        "dataset_text_field field_messages field_instruction field_output prompt_column response_column "
        "messages_column text_column columns dataset_columns train_on_split field_system message_field_role "
        "message_field_content message_property_mappings"
    ),
    "experts are counted as they are named": "num_experts num_local_experts n_experts n_adapters num_adapters",
    "weights of a mix and of a vote always come to 1, and a merge takes them as they are": "normalize normalise",
    "a gate reads the stream of the layer in one linear step and one hidden layer": (
        "xlora_depth xlora_dropout_p softmax_temperature enable_softmax enable_softmax_topk use_trainable_adapters "
        "scaling_pass_value global_scaling_weight"
    ),
    "experts are merged at the precision of the base": "int8_mask out_dtype slices tokenizer_source",
    "it is settled": (
        "adam_beta1 adam_beta2 adam_epsilon adam_eps beta1 beta2 betas eps label_smoothing_factor label_smoothing "
        "neftune_noise_alpha neftune bias lora_bias inference_mode fan_in_fan_out group_by_length train_by_length "
        "pad_to_sequence_len strict do_train do_predict debug use_liger_kernel enable_liger_kernel liger unsloth "
        "use_unsloth torch_compile compile metric_for_best_model load_best_model_at_end greater_is_better "
        "include_tokens_per_second lr_scheduler_kwargs min_lr cosine_min_lr_ratio loraplus_lr_ratio embedding_lr "
        "per_device_eval_batch_size eval_batch_size optim_args shuffle loss_type"
    ),
    "adapters only, with no layer besides": (
        "modules_to_save additional_target lora_modules_to_save trainable_token_indices rank_pattern alpha_pattern "
        "layers_pattern layer_replication lora_fan_in_fan_out freeze_trainable_layers"
    ),
    "`python -m toolkit export RUN --to hub:USER/NAME` uploads": (
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo push_to_hub_model_id"
    ),
    "YAML's merge key is not read here; write the keys out": "<<",
    "preference learning is not in this version; task is chat, classify or text2text": (
        "rl beta pref_beta dpo kto orpo reward_model ref_model pref_loss"
    ),
}

# Words for the keys of a range, which stands below any key of a search space.
OF_RANGES: Mapping[str, str] = {
    "min": "low", "minimum": "low", "from": "low", "lower": "low", "start": "low", "max": "high", "maximum": "high",
    "to": "high", "upper": "high", "stop": "high", "end": "high", "q": "step", "log_scale": "log", "logarithmic": "log",
}  # fmt: skip

PLACE_OF: Mapping[str, str] = {word: key for key, words in CALLED.items() for word in words.split()}
NO_KEY: Mapping[str, str] = {word: why for why, words in REMOVE.items() for word in words.split()}

# Values of other tools, by key: what to write.
VALUES: Mapping[str, Mapping[str, str]] = {
    "task": {
        "sft": "chat", "classification": "classify", "text_classification": "classify", "seq_cls": "classify",
        "summarize": "text2text", "summarise": "text2text", "summarization": "text2text", "translate": "text2text",
        "translation": "text2text", "seq2seq": "text2text", "causal_lm": "chat", "instruction": "chat",
        "dialogue": "chat",
    },
    "base.quantize": {
        "4bit": "nf4", "int4": "nf4", "fp4": "nf4", "qlora": "nf4", "bnb": "nf4", "bitsandbytes": "nf4",
    },
    "data.format": {
        "chatml": "messages", "chat": "messages", "conversational": "messages", "openai": "messages",
        "chat_template": "messages", "conversations": "sharegpt", "instruction": "alpaca", "completion": "text",
        "pretraining": "text", "plain": "text",
    },
    "adapter.kind": {
        "dora": "lora, with dora: true", "rslora": "lora, with rank_stabilised: true",
        "pissa": "lora, with init: pissa", "qlora": "lora, with base: {quantize: nf4}", "loreft": "reft",
        "loreft_adapter": "reft", "p-tuning": "p_tuning", "ptuning": "p_tuning", "prompt": "prompt_tuning",
        "prefix-tuning": "prefix", "full_finetune": "full", "fft": "full", "full_finetuning": "full",
        "embeddings": "embedding", "bone": "miss", "layernorm": "ln_tuning", "ln": "ln_tuning",
        "olora": "lora, with init: pissa", "rs_lora": "lora, with rank_stabilised: true",
    },
    "adapter.targets": {"all": "all-linear", "all_linear": "all-linear", "linear": "all-linear"},
    "train.optimizer": {
        "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adam": "adamw", "adamw_8bit": "adamw",
        "paged_adamw_8bit": "adamw", "adamw_bnb_8bit": "adamw", "paged_adamw_32bit": "adamw", "adamw_hf": "adamw",
    },
    "train.schedule": {
        "constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "cosine_with_min_lr": "cosine",
        "polynomial": "linear", "one_cycle": "cosine", "wsd": "cosine", "warmup_stable_decay": "cosine",
    },
    "train.precision": {
        "float32": "fp32", "32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "no": "fp32",
        "none": "fp32",
    },
    "evaluate.metrics": {
        "perplexity": "loss", "ppl": "loss", "f1": "macro_f1", "bpb": "bits_per_byte", "chrf++": "chrf",
    },
    "combine.kind": {
        "moe": "gate", "mixture_of_experts": "gate", "xlora": "gate", "x_lora": "gate",
        "arrow": "gate, with how: arrow",
        "router": "route", "routing": "route", "ensemble": "vote", "voting": "vote", "majority": "vote, with how: hard",
        "bagging": "bag", "random_forest": "bag", "boosting": "boost", "adaboost": "boost", "merging": "merge",
        "average": "merge", "soup": "merge", "model_soup": "merge", "mixture": "mix", "product_of_experts": "mix",
        "ties": "merge, with method: ties", "dare_ties": "merge, with method: dare_ties",
        "dare_linear": "merge, with method: dare_linear", "linear": "merge, with method: linear",
        "task_arithmetic": "merge, with method: exact",
    },
    "combine.method": {
        "cat": "exact", "task_arithmetic": "exact", "sum": "exact", "weighted_sum": "exact", "average": "exact",
        "linear_svd": "svd", "ties_svd": "ties", "dare_linear_svd": "dare_linear", "dare_ties_svd": "dare_ties",
        "magnitude_prune_svd": "magnitude_prune", "dare": "dare_linear", "prune": "magnitude_prune",
    },
    "combine.router": {
        "mean": "centroid", "nearest": "centroid", "knn": "centroid", "mlp": "classifier", "network": "classifier",
        "sbert": "embedding", "sentence_transformers": "embedding", "semantic": "embedding",
    },
    "combine.over": {
        "logits": "logprob", "log_prob": "logprob", "logprobs": "logprob", "product": "logprob", "probs": "prob",
        "probability": "prob", "probabilities": "prob", "sum": "prob",
    },
    "combine.how": {
        "majority": "hard", "average": "soft", "mean": "soft", "log_prob": "logprob", "product": "logprob",
        "xlora": "learned", "trained": "learned",
    },
    "combine.vote": {
        "majority": "hard", "average": "soft", "mean": "soft", "log_prob": "logprob", "product": "logprob",
    },
    "combine.weights": {
        "uniform": "equal", "same": "equal", "auto": "search", "optuna": "search", "learned": "search",
        "fitted": "search", "fit": "search",
    },
    "data.clean.too_long": {"truncate": "drop_old_turns", "truncation": "drop_old_turns"},
}  # fmt: skip


def normal(word: str) -> str:
    """A word as these tables spell it."""
    return word.lower().replace("-", "_").strip()

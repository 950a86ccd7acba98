"""Which option is meant by a name that is none: names that people guess, or know from other programs."""

from argparse import Action
from collections.abc import Iterable
from difflib import get_close_matches

MEANT = {
    "optimizer.lr": "lr learning_rate learningrate optim_lr base_lr max_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.betas '[0.9, 0.95]'": "adam_beta1 adam_beta2 betas",
    "optimizer": "optim optimizer_name optimizer_type",
    "teacher_checkpoint_dir": "teacher teacher_dir teacher_model teacher_path teacher_checkpoint teacher_model_path"
    " teacher_model_name_or_path teacher_name_or_path teacher_model_name",
    "teacher_dir": "teacher teacher_checkpoint_dir teacher_model model model_path model_name_or_path checkpoint_dir",
    "checkpoint_dir": "student student_dir student_model student_path student_checkpoint_dir model model_name"
    " model_path model_name_or_path model_dir base_model pretrained_model_name_or_path checkpoint policy_model_name"
    " teacher teacher_dir teacher_checkpoint_dir",
    "before_checkpoint_dir": "before before_dir untrained",
    "out_dir": "output_dir output output_path save_dir save_path outdir out",
    "out": "output_file out_file out_path output_dir output output_path save_path outdir out_dir",
    "runs": "run run_dir run_dirs input out_dirs",
    "train.epochs": "epochs num_epochs num_train_epochs max_epochs n_epochs",
    "train.max_steps": "steps max_train_steps num_steps total_steps max_num_steps max_tokens",
    "train.micro_batch_size": "per_device_train_batch_size per_device_eval_batch_size micro_batch mbs device_batch_size"
    " eval_batch_size",
    "train.global_batch_size": "batch_size train_batch_size train_global_batch_size gbs gradient_accumulation_steps"
    " gradient_accumulation grad_accum_steps",
    "batch_size": "per_device_train_batch_size per_device_eval_batch_size micro_batch_size global_batch_size"
    " eval_batch_size train.micro_batch_size train.global_batch_size",
    "train.max_seq_length": "max_length cutoff_len seq_length seq_len model_max_length max_len max_seq_len block_size"
    " context_length max_total_sequence_length",
    "max_seq_length": "max_length cutoff_len seq_length seq_len model_max_length max_len max_seq_len",
    "max_new_tokens": "max_length max_tokens max_completion_length",
    "train.lr_warmup_steps": "warmup_steps num_warmup_steps lr_warmup warmup",
    "train.lr_warmup_fraction": "warmup_ratio warmup_fraction",
    "train.min_lr": "lr_scheduler_type lr_scheduler scheduler lr_min",
    "train.max_norm": "max_grad_norm grad_clip clip_grad_norm gradient_clip_val",
    "train.log_interval": "logging_steps log_every log_every_n_steps",
    "train.save_interval": "save_steps save_every save_period checkpoint_interval",
    "eval.interval": "eval_steps eval_interval val_interval val_period",
    "keep_last": "save_total_limit keep_checkpoints keep_top_k",
    "resume auto": "resume_from_checkpoint resume_from continue",
    "overwrite true": "overwrite_output_dir force",
    "precision": "bf16 fp16 amp mixed_precision dtype torch_dtype",
    "activation_checkpointing true": "gradient_checkpointing recompute",
    "compile true": "torch_compile",
    "devices": "gpus num_gpus n_gpus gpus_per_node nproc_per_node num_devices tensor_parallel_size num_processes",
    "num_nodes": "nnodes nodes",
    "logger_name": "report_to logger",
    "teacher.quantize nf4": "load_in_4bit",
    "teacher.quantize int8": "load_in_8bit",
    "lora.r": "lora lora_r lora_rank lora_dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "teacher.cache_dir": "cache cache_dir teacher_cache",
    "data StreamingSFT --data.path": "dataset dataset_path dataset_name dataset_dir data_path data_file data_files"
    " data_dir train_file train_data input prompts train path",
    "data JSON --data.json_path": "json_path",
    "data.mask_prompt true": "mask_prompt train_on_responses_only completion_only_loss",
    "data.prompt_style": "template chat_template prompt_style",
    "distill.divergence": "divergence distill loss loss_type loss_fn kd_loss objective kl_type",
    "distill.temperature": "temperature kd_temperature temp",
    "generation.temperature": "temperature temp",
    "distill.kd_ratio": "kd_alpha kd_weight distill_weight kd_coef distill_loss_weight",
    "distill.on_policy": "lmbda on_policy_fraction onpolicy",
    "samples": "num_samples n num_generations num_return_sequences",
    "layers": "num_layers n_layer n_layers num_hidden_layers keep_layers",
    "dry_run true": "dryrun",
    "access_token": "hf_token token",
}
"""Options, and names for them that people know, as a rule, from Transformers, TRL, LLaMA-Factory and NeMo.

Behind an option may stand the value that goes with it. Of several options of one name the first that a command has.
"""


def suggestion(name: str, options: dict[str, Action], value: str = "") -> str:
    """What to say after ``there is no option --name``, given the options of the command; empty if none is near.

    ``value`` is what was given for the name.
    """
    near = _meant(name, options) or close_to(name, options)
    if not near:
        return ""
    if near[0] in options and not options[near[0]].option_strings:
        return f"; give {near[0]} without a name, right after the command"
    takes = f" {value}" if value and near[0].endswith("path") else ""
    return f"; did you mean --{' or --'.join(near)}{takes}?"


def close_to(name: str, known: Iterable[str]) -> list[str]:
    """The one of the known names that is most like it, if any is, whatever its capitals; or else its last part."""
    for part in (str, _last_part):
        by_part = {part(each).lower(): each for each in known}
        if close := get_close_matches(part(name).lower(), by_part, n=1):
            return [by_part[close[0]]]
    return []


def _meant(name: str, options: dict[str, Action]) -> list[str]:
    name = name.replace("-", "_").lower()
    for word in dict.fromkeys((name, _last_part(name))):
        named = [option for option, names in MEANT.items() if word in names.split() and _has(options, option)]
        same = [option for option in options if _last_part(option) == word]
        if named or same:
            return named[:1] or same
    return []


def _has(options: dict[str, Action], option: str) -> bool:
    """Whether a command has an option; those of optimizer and data belong to a class."""
    option = option.split()[0]
    group = option.partition(".")[0]
    return option in options or (group in ("optimizer", "data") and group in options)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]

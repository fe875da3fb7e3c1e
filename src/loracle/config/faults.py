"""A fault that pydantic found, as one sentence: key, what is allowed, what was given.

An unknown key leads to ours: to the name of the same thing in PEFT, Transformers or TRL, to the
section that has a key of that name, or to the nearest spelling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from loracle.config.run import Config
from loracle.errors import did_you_mean

WORD_OR_MAPPING = {
    "placement": "a preset's name or a mapping with modules and layers",
    "template": "alpaca or a mapping with with_input and without_input",
}
"""Keys that take a word or a mapping. The mapping is one value: it is replaced, not merged."""

# source: LoraConfig, huggingface/peft@v0.21; TrainingArguments, huggingface/transformers@v5.23;
# SFTConfig, huggingface/trl@v1.16; and the words of alpaca-lora, axolotl and LLaMA-Factory.
NAMES_ELSEWHERE = {
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.placement": "target_modules lora_target_modules lora_target layers_to_transform "
    "rank_pattern modules_to_adapt",
    "train.max_steps": "epochs epoch num_epochs num_train_epochs n_epochs num_steps total_steps",
    "train.batch_size": "per_device_train_batch_size train_batch_size global_batch_size bsz "
    "gradient_accumulation_steps",
    "train.micro_batch_tokens": "micro_batch_size",
    "train.learning_rate": "lr max_lr peak_lr",
    "train.schedule": "lr_scheduler_type lr_scheduler scheduler",
    "train.warmup_frac": "warmup_ratio warmup_steps warmup num_warmup_steps",
    "train.weight_decay": "wd",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.epsilon": "adam_epsilon eps",
    "train.max_grad_norm": "grad_clip gradient_clipping clip_grad_norm max_norm",
    "data.source": "dataset dataset_name dataset_path data_path train_file",
    "data.max_tokens": "max_length max_seq_length max_seq_len seq_length cutoff_len sequence_len "
    "block_size model_max_length",
    "data.validation_frac": "val_set_size test_size val_size validation_split eval_frac",
    "data.split_seed": "data_seed",
    "data.max_records": "max_samples max_train_samples num_samples",
    "data.template": "prompt_template chat_template",
    "eval.every_steps": "eval_steps eval_strategy evaluation_strategy",
    "eval.batch_tokens": "per_device_eval_batch_size eval_batch_size",
    "eval.max_new_tokens": "max_gen_length",
    "checkpoint.every_steps": "save_steps save_strategy",
    "checkpoint.keep": "save_total_limit",
    "tracking.mode": "report_to wandb use_wandb",
    "tracking.project": "wandb_project",
    "model": "model_name model_name_or_path model_id base_model base_model_name_or_path",
    "dtype": "torch_dtype bf16 fp16 precision",
    "quantization": "load_in_4bit load_in_8bit quantization_config bits",
    "seed": "random_seed",
}
"""Our keys and the names that other libraries have for them."""
_OURS = {name: key for key, names in NAMES_ELSEWHERE.items() for name in names.split()}
_IN_A_PLACEMENT = {"target_modules": "modules", "layers_to_transform": "layers"}
_UNITS = {
    "train.max_steps": "optimizer steps",
    "train.batch_size": "examples per optimizer step",
    "train.micro_batch_tokens": "tokens per pass",
    "train.warmup_frac": "a fraction of train.max_steps",
    "eval.batch_tokens": "tokens per pass",
}


def describe_fault(fault: Any, tree: Mapping[str, Any], *, root: type[BaseModel]) -> str | None:
    """Returns a fault as ``key: what is allowed, what was given``; None if another covers it."""
    if not fault["loc"]:
        return str(fault["msg"].removeprefix("Value error, "))
    *parents, given = fault["loc"]
    is_unknown = fault["type"] == "extra_forbidden"
    location = [part for part in parents if not _is_union_label(part)]
    location += [given] if is_unknown or not _is_union_label(given) else []
    key, last = ".".join(str(part) for part in location), str(location[-1])
    value = _value_at(location, tree)
    if is_unknown:
        return f"{key}: unknown key{_nearest_key(location, root=root)}"
    if fault["type"] == "missing":
        return f"{key}: missing"
    if last in WORD_OR_MAPPING and fault["type"] in ("string_type", "literal_error", "model_type"):
        is_mapping = isinstance(value, Mapping)
        return None if is_mapping else f"{key}: must be {WORD_OR_MAPPING[last]}, got {value!r}"
    if fault["type"] == "model_type":
        return f"{key}: must be a section of 'key: value' lines, got {value!r}"
    message = fault["msg"].removeprefix("Value error, ")
    allowed = re.findall(r"'([^']+)'", message) if fault["type"] == "literal_error" else []
    hint = did_you_mean(str(value), allowed)
    return f"{key}: {message[0].lower()}{message[1:]}, got {value!r}{hint}"


def _is_union_label(part: str | int) -> bool:
    """Returns whether pydantic added this part of a location to name a branch of a union."""
    return isinstance(part, str) and bool(re.search(r"[\[(]|^(str|int|list)$|Config$", part))


def _siblings(location: Sequence[str | int], *, root: type[BaseModel]) -> Iterable[str]:
    section: Any = root
    parts = iter(location[:-1])
    for part in parts:
        annotation = section.model_fields[part].annotation
        if getattr(annotation, "__origin__", None) is dict:
            next(parts)  # the entry's name in the file
        branches = getattr(annotation, "__args__", ())
        options = [annotation, *(getattr(branch, "__origin__", branch) for branch in branches)]
        section = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return section.model_fields  # type: ignore[no-any-return]


def _value_at(location: Sequence[str | int], tree: Any) -> Any:
    for part in location:
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _nearest_key(location: Sequence[str | int], *, root: type[BaseModel]) -> str:
    """Returns ``; did you mean '...'?`` for an unknown key, or an empty string."""
    last, siblings = str(location[-1]), list(_siblings(location, root=root))
    name = last.strip().lower().replace("-", "_")
    # Keys of a run stand under ``config`` in a study.
    prefix = "config." if "config" in root.model_fields else ""
    if name in _OURS:
        key, unit = _OURS[name], _UNITS.get(_OURS[name])
        shorts = key.rpartition(".")[2], _IN_A_PLACEMENT.get(name, "")
        beside = [
            ".".join(map(str, [*location[:-1], short])) for short in shorts if short in siblings
        ]
        full = beside[0] if beside else prefix + key
        return f"; did you mean '{full}'{f' ({unit})' if unit else ''}?"
    elsewhere = [key for key in dotted_keys(Config) if key.rpartition(".")[2] == name]
    if elsewhere:
        listed = " or ".join(f"'{prefix}{key}'" for key in elsewhere)
        return f"; did you mean {listed}?"
    return did_you_mean(last, siblings)


def dotted_keys(model: type[BaseModel], *, prefix: str = "") -> Iterator[str]:
    """Yields the dotted key of every section and field, of a mapping's other form none."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from dotted_keys(field.annotation, prefix=f"{prefix}{name}.")

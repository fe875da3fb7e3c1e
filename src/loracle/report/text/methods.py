"""The methods section of a study, written from its configuration and records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loracle.config.bleu import DEFAULT
from loracle.records.study_folder import StudyRecord
from loracle.report.text.numbers import count, interval_words, percent
from loracle.report.text.provenance import Provenance, data_of
from loracle.text import plural


def methods_paragraphs(study: StudyRecord, provenance: Provenance) -> list[str]:
    """Returns a paragraph each on model and data, training, arms, measures, statistics."""
    config = study.study["config"]
    paragraphs = (
        _model_and_data(study, config, provenance),
        _training(study, config),
        _arms(study, config),
        _measures(config, provenance, tokenizer=study.runs[0].result.quality.tuned.tokenizer),
        _statistics(study),
    )
    return [" ".join(sentences) for sentences in paragraphs]


def _model_and_data(
    study: StudyRecord, config: Mapping[str, Any], provenance: Provenance
) -> Iterator[str]:
    data, settings = data_of(study), config["data"]
    yield (
        f"The base is {config['model']} ({count(study.inventory.total_params)} parameters, "
        f"{study.inventory.num_layers} layers), frozen, its weights in "
        f"{_dtype(study, config)}."
    )
    train = data.get("train", {}).get("num_examples")
    template = settings["template"] if isinstance(settings["template"], str) else "study's own"
    yield (
        f"The data is {settings['source']}: {count(train)} training and "
        f"{count(provenance.num_examples)} scored validation examples, split with seed "
        f"{settings['split_seed']} ({percent(settings['validation_frac'], decimals=0)} held out; "
        f"a task that recurs is never on both sides), at most {settings['max_tokens']} "
        f"tokens each, in the {template} template. The loss counts the response and its end of "
        f"sequence only."
    )


def _dtype(study: StudyRecord, config: Mapping[str, Any]) -> str:
    if config["dtype"] != "auto":
        return str(config["dtype"])
    parts = dict(
        part.split(":", 1) for part in study.runs[0].result.signature.split("|") if ":" in part
    )
    return str(parts.get("dtype", "the device's best type"))


def _training(study: StudyRecord, config: Mapping[str, Any]) -> Iterator[str]:
    train = config["train"]
    epochs = num_epochs(study)
    passes = "" if epochs is None else f", {epochs:.2g} passes over the training set"
    norm = train["max_grad_norm"]
    clipping = (
        "no gradient clipping" if norm is None else f"gradients clipped to an L2 norm of {norm:g}"
    )
    yield (
        f"Every run takes {plural(train['max_steps'], 'optimizer step')} of "
        f"{plural(train['batch_size'], 'example')}{passes}, with AdamW (beta "
        f"{train['beta1']:g} and {train['beta2']:g}, epsilon {train['epsilon']:g}, weight decay "
        f"{train['weight_decay']:g}) at a peak learning rate of {_rates(study)}, a "
        f"{train['schedule']} schedule after a warm-up of "
        f"{percent(train['warmup_frac'], decimals=0)} of the steps, and "
        f"{clipping}."
    )
    yield f"Adapter dropout is {config['lora']['dropout']:g}."
    yield (
        "Within a seed, all arms see the same examples in the same order, and an adapter of a "
        "module starts from the same random matrix in every arm that has it at that rank."
    )


def num_epochs(study: StudyRecord) -> float | None:
    """Returns passes over the training set per run; None if its size was not recorded."""
    train = study.study["config"]["train"]
    examples = data_of(study).get("train", {}).get("num_examples")
    return train["max_steps"] * train["batch_size"] / examples if examples else None


def _rates(study: StudyRecord) -> str:
    rates = {
        arm.name: sorted({run.learning_rate for run in study.runs_of(arm.name).values()})
        for arm in study.arms
    }
    distinct = sorted({rate for of_arm in rates.values() for rate in of_arm})
    if len(distinct) == 1:
        return f"{distinct[0]:g} in every arm"
    by_arm = ", ".join(
        f"{' and '.join(f'{rate:g}' for rate in of_arm)} ({arm})"
        for arm, of_arm in rates.items()
        if of_arm
    )
    return f"its own per arm, {by_arm}"


def _arms(study: StudyRecord, config: Mapping[str, Any]) -> Iterator[str]:
    names = ", ".join(
        f"{arm.name} ({'full fine-tuning' if arm.rank is None else f'r {arm.rank}'})"
        for arm in study.arms
    )
    seeds = ", ".join(map(str, study.study["seeds"]))
    yield f"{plural(len(study.arms), 'arm')}: {names}; seeds {seeds}."
    yield _budget(study)
    lora = config["lora"]
    yield (
        f"alpha / r is {lora['alpha'] / lora['rank']:g} in every arm with adapters. Arms differ in "
        f"{_differences(study)}, and in nothing else; the software refuses a study in which they "
        f"do."
    )


def _differences(study: StudyRecord) -> str:
    placement, rank = "placement", "the rank that the budget implies"
    if study.study.get("search"):
        return f"{placement}, in {rank} and in the learning rate that a search found for each"
    if any(arm.rank is None for arm in study.arms):
        return f"{placement} and in {rank}, full fine-tuning also in its learning rate"
    return f"{placement} and in {rank}"


def _budget(study: StudyRecord) -> str:
    if study.study.get("budget") != "equal-parameters":
        return "All arms have the same rank, so their numbers of trainable parameters differ."
    gaps = [arm.budget_gap_frac for arm in study.arms if arm.budget_gap_frac is not None]
    params = count(study.arm(study.reference).trainable_params)
    spread = (
        f" (gaps from {percent(min(gaps), sign=True)} to {percent(max(gaps), sign=True)})"
        if gaps
        else ""
    )
    return (
        f"The rank of each arm is the one whose number of trainable parameters comes closest to "
        f"that of {study.reference}, {params}{spread}."
    )


def _measures(
    config: Mapping[str, Any], provenance: Provenance, *, tokenizer: str
) -> Iterator[str]:
    by = "" if tokenizer == DEFAULT else f" (tokenizer {tokenizer})"
    yield (
        f"Validation loss is token-weighted over {provenance.num_targets:,} target tokens; "
        f"perplexity is its exponential."
    )
    if provenance.num_answers:
        yield (
            f"BLEU is sacreBLEU's corpus BLEU{by} over "
            f"{provenance.num_answers:,} greedy answers of at most "
            f"{config['eval']['max_new_tokens']} tokens; an empty answer counts."
        )
    yield (
        f"Step time is the median over optimizer steps alone, the first "
        f"{config['measure']['skip_steps']} left out; memory is the peak of the training phase; "
        f"both are measured with no other arm beside it."
    )


def _statistics(study: StudyRecord) -> Iterator[str]:
    level = interval_words(study.coverage)
    yield (
        f"Each arm is compared with {study.reference} by the token-weighted mean difference over "
        f"the same seeds and the same examples. The {level} counts the chance of seeds and "
        f"of examples (variances of a two-way crossed design; critical value between Student's t "
        f"of the one and of the other, after Cochran 1964); p-values are Holm-corrected over the "
        f"arms. BLEU differences are bootstrapped over examples (Koehn 2004), with the variance "
        f"between seeds added."
    )
    yield (
        "An arm is called better or worse only if its corrected p is below 0.05 and the difference "
        "is larger than the noise floor, where that was measured; otherwise it is not "
        "distinguishable, which does not mean equal."
    )

"""What a study cannot show, computed from its size and its design."""

from __future__ import annotations

import math
from collections.abc import Iterator

from loracle.analysis.rate_search import arms_at_the_edge
from loracle.records.result import perplexity_of
from loracle.records.study_folder import StudyRecord
from loracle.report.text.methods import num_epochs
from loracle.report.text.numbers import LOSS_DECIMALS, percent
from loracle.report.text.provenance import Provenance, data_of
from loracle.text import plural

# assumed: below these, a reader should not expect an ordering to carry over
_SMALL_MODEL_PARAMS = 1_000_000_000
_FEW_EXAMPLES = 1000
_FEW_SEEDS = 5
_FEW_ANSWERS = 200


def limits(
    study: StudyRecord, provenance: Provenance, *, smallest_effect_nats: float | None
) -> list[str]:
    """Returns what the study cannot show, computed from its size and design.

    ``smallest_effect_nats`` is the loss difference found with a power of 80 %, the largest over the
    arms; None: not known.
    """
    return [
        *_limits_of_data(study),
        *_limits_of_size(study, provenance),
        *_limits_of_power(provenance, smallest_effect_nats),
        *_limits_of_design(study),
    ]


def data_warnings(study: StudyRecord) -> list[str]:
    """Returns what the runs say of records that were left out or cut, each line once."""
    return list(dict.fromkeys(line for run in study.runs for line in run.result.data_warnings))


def _limits_of_data(study: StudyRecord) -> Iterator[str]:
    for line in data_warnings(study):
        yield f"The results speak of the records that were used alone: {line}."


def _limits_of_size(study: StudyRecord, provenance: Provenance) -> Iterator[str]:
    total = study.inventory.total_params
    if total < _SMALL_MODEL_PARAMS:
        yield (
            f"One base model of {total / 1e6:,.0f} million parameters: whether larger models order "
            f"the placements the same way is not tested here."
        )
    else:
        yield "One base model: whether others order the placements the same way is not tested here."
    train = data_of(study).get("train", {}).get("num_examples")
    if train is not None and train < _FEW_EXAMPLES:
        yield (
            f"{train:,} training examples from one source: too few to fill an adapter, so this "
            f"says little about data-rich fine-tuning, where placements may differ more."
        )
    else:
        yield "One data source: other tasks may order the placements differently."
    epochs = num_epochs(study)
    if epochs is not None and epochs < 1:
        yield f"Training stops after {percent(epochs, decimals=0)} of one pass over the data."
    answers = provenance.num_answers
    if not answers:
        yield "No answers were generated, so nothing is known about BLEU."
    elif answers < _FEW_ANSWERS:
        yield (
            f"BLEU rests on {plural(answers, 'short answer')}: a coarse number; the loss is the "
            f"sensitive one."
        )


def _limits_of_power(provenance: Provenance, smallest: float | None) -> Iterator[str]:
    seeds = len(provenance.seeds)
    if seeds == 1:
        yield "One seed: there is no interval over seeds, so no arm can be called better or worse."
    elif seeds < _FEW_SEEDS:
        yield f"{plural(seeds, 'seed')}: the spread between seeds is itself poorly known."
    if smallest is not None and perplexity_of(smallest) is not None:
        yield (
            f"With {plural(seeds, 'seed')} and {plural(provenance.num_examples, 'example')}, a "
            f"true difference below about {smallest:.{LOSS_DECIMALS}f} nats per token "
            f"({100 * math.expm1(smallest):.2f} % of perplexity) would often go unseen."
        )


def _limits_of_design(study: StudyRecord) -> Iterator[str]:
    adapted = {arm.name for arm in study.arms if arm.rank is not None}
    counted = [run for run in study.runs if run.role == "arm" and run.arm in adapted]
    rates = {run.learning_rate for run in counted}
    if edge := arms_at_the_edge(study):
        yield (
            f"The learning rate of {', '.join(edge)} ends the grid that was searched: one beyond "
            "it might be better."
        )
    if len(rates) == 1 and not study.study.get("search"):
        yield (
            "One learning rate for all arms: an arm that would prefer another is at a disadvantage "
            "that this study cannot tell from its placement."
        )
    kinds = {run.result.efficiency.peak_memory_gib.kind_of_training for run in study.runs}
    if "tensors" in kinds:
        yield "Memory is what live tensors take on a CPU; a GPU's kernels and allocator add to it."
    if "resident_set" in kinds:
        yield (
            "Memory is the resident set of a process on a CPU; a GPU's allocator gives other "
            "figures."
        )
    yield "Times belong to the machine that is named; orderings of cost may differ on another."

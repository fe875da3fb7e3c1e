"""What a study advises to take, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loracle.analysis.costs import Axis, costs_of
from loracle.analysis.recommendation import recommend
from loracle.analysis.verdicts import Verdicts
from loracle.records.study_folder import StudyRecord


def advice(study: StudyRecord, verdicts: Verdicts) -> list[str]:
    """Returns what to take without a limit, and under a limit of memory and of time.

    A limit lies half-way between the cheapest and the dearest arm: it lets some arms in and
    keeps others out. Where costs hardly differ there is none.
    """
    sentences = [_sentence(recommend(study, verdicts).words)]
    memory, time = _half_way(study, "peak_memory_gib"), _half_way(study, "step_time_s")
    if memory is not None:
        sentences.append(_sentence(recommend(study, verdicts, max_memory_gib=memory).words))
    if time is not None:
        sentences.append(_sentence(recommend(study, verdicts, max_step_time_s=time).words))
    return list(dict.fromkeys(sentences))


def _half_way(study: StudyRecord, axis: Axis) -> float | None:
    medians: Sequence[float] = [cost.median for cost in costs_of(study, axis).values()]
    if len(medians) < 2 or max(medians) < 1.1 * min(medians):
        return None
    middle = (min(medians) + max(medians)) / 2
    step: float = 10.0 ** (math.floor(math.log10(middle)) - 1)
    return round(math.ceil(middle / step) * step, 10)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] if words.startswith("within") else words

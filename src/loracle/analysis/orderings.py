"""Orderings of placements that were published, and what a study says of each.

An arm stands for a placement if it adapts exactly the modules that the placement means, whatever
it is called. Two arms are compared directly, never through the reference; Holm corrects over the
comparisons of one ordering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Literal

from loracle.analysis.comparison import Comparison, judged
from loracle.analysis.costs import Cost, amount_words, arm_costs, costs_more, ratio_range
from loracle.analysis.rate_search import SharedRate, shared_rate
from loracle.errors import PlacementError
from loracle.placement.presets import (
    Selector,
    all_linear,
    by_role,
    output_projections,
    projections,
)
from loracle.records.study_folder import ArmRecord, StudyRecord

if TYPE_CHECKING:
    from loracle.analysis.verdicts import Verdicts
    from loracle.placement import Inventory
    from loracle.placement.presets import Modules

Outcome = Literal["reproduced", "contradicted", "not distinguishable", "not tested"]

# assumed: budgets this close are equal; a step of the rank is at most 3% of those that we know of.
_EQUAL_PARAMS_FRAC = 0.05


@dataclass(frozen=True)
class Ordering:
    """A published claim and what this study says of it."""

    id: str
    """O1 to O6."""
    claim: str
    """What was published, in words."""
    source: str
    """Authors, year and where."""
    outcome: Outcome
    """Whether this study shows the same, the opposite, neither, or has no arms to tell."""
    comparisons: tuple[Comparison, ...]
    """Direct ones; ``arm`` is the one that should be better. Empty where a cost is compared."""
    evidence: str
    """The figures, or what is missing, in a sentence or two."""


@dataclass(frozen=True)
class _Claim:
    id: str
    claim: str
    source: str
    searched_rates: bool = False
    """Whether a source of it gave each condition a learning rate of its own."""


@dataclass(frozen=True)
class _Finding:
    outcome: Outcome
    evidence: str
    comparisons: tuple[Comparison, ...] = ()


_FEED_FORWARD_BEFORE_ATTENTION = _Claim(
    "O1",
    "At equal parameters, adapters on the feed-forward layers learn more than on attention.",
    "Schulman et al. 2025, LoRA Without Regret (Thinking Machines); He et al. 2022, "
    "arXiv:2110.04366, except at the smallest budgets; Zhang et al. 2023, arXiv:2303.10512; "
    "Biderman et al. 2024, arXiv:2405.09673, at equal rank",
    searched_rates=True,
)
_ALL_BEFORE_QUERY_VALUE = _Claim(
    "O2",
    "All linear layers at a low rank are at least as good as query and value at a high rank.",
    "Dettmers et al. 2023, arXiv:2305.14314; Raschka 2023, Ahead of AI",
    searched_rates=True,
)
_VALUE_AND_OUTPUT_FIRST = _Claim(
    "O3",
    "Of the attention projections alone, value and output learn more than query and key.",
    "Hu et al. 2021, arXiv:2106.09685, table 5; Hayou et al. 2025, arXiv:2506.20629",
    searched_rates=True,
)
_RANK_HELPS_TO_A_POINT = _Claim(
    "O4",
    "The validation loss does not rise with the rank: it falls and then stays.",
    "Hu et al. 2021, arXiv:2106.09685, table 18; Schulman et al. 2025, LoRA Without Regret "
    "(Thinking Machines)",
    searched_rates=True,
)
_MEMORY_IS_IN_THE_PLACE = _Claim(
    "O5",
    "Memory depends on which modules are adapted: feed-forward takes more than query and value "
    "at equal parameters.",
    "PEFT method comparison 2025, MetaMathQA (huggingface/peft pull request 2845)",
)
_RANK_FORGETS = _Claim(
    "O6",
    "A high rank forgets more of other text than a low one, full fine-tuning most.",
    "Biderman et al. 2024, arXiv:2405.09673",
)


def published_orderings(study: StudyRecord, verdicts: Verdicts) -> list[Ordering]:
    """Returns the published orderings O1 to O6, each with what this study's arms say of it."""
    tests: list[tuple[_Claim, Callable[[StudyRecord, Verdicts], _Finding]]] = [
        (_FEED_FORWARD_BEFORE_ATTENTION, _feed_forward_before_attention),
        (_ALL_BEFORE_QUERY_VALUE, _all_before_query_value),
        (_VALUE_AND_OUTPUT_FIRST, _value_and_output_first),
        (_RANK_HELPS_TO_A_POINT, _rank_helps_to_a_point),
        (_MEMORY_IS_IN_THE_PLACE, lambda study, _: _memory_is_in_the_place(study)),
        (_RANK_FORGETS, lambda *_: _not_tested("Forgetting of other text is not measured.")),
    ]
    rate = shared_rate(study)
    found = [(claim, _at_rate(rate, claim, test(study, verdicts))) for claim, test in tests]
    return [
        Ordering(
            claim.id,
            claim.claim,
            claim.source,
            outcome=finding.outcome,
            comparisons=finding.comparisons,
            evidence=finding.evidence,
        )
        for claim, finding in found
    ]


def _at_rate(rate: SharedRate | None, claim: _Claim, finding: _Finding) -> _Finding:
    """Returns the finding; of a claim at searched rates, not tested at a shared one."""
    if rate is None or not claim.searched_rates or finding.outcome == "not tested":
        return finding
    evidence = (
        f"A source searched the learning rate; here all arms with adapters ran at "
        f"{rate.learning_rate:g}. At that rate: {finding.evidence}"
    )
    return _Finding("not tested", evidence, finding.comparisons)


def _feed_forward_before_attention(study: StudyRecord, verdicts: Verdicts) -> _Finding:
    pair = _equal_in_params(study, by_role("feed-forward"), by_role("attention"))
    if pair is None:
        return _not_tested("No two arms of equal parameters are feed-forward and attention.")
    return _compared(verdicts, [pair])


def _all_before_query_value(study: StudyRecord, verdicts: Verdicts) -> _Finding:
    pairs = [
        (ours.name, theirs.name)
        for ours, theirs in _arms_on(study, all_linear, projections("q", "v"))
        if ours.rank is not None and theirs.rank is not None and ours.rank < theirs.rank
    ]
    if not pairs:
        return _not_tested(
            "No two arms are all linear layers and, at a higher rank, query and value."
        )
    return _compared(verdicts, pairs)


def _value_and_output_first(study: StudyRecord, verdicts: Verdicts) -> _Finding:
    pairs = [
        (ours.name, theirs.name)
        for better, worse in product((projections("v"), _attention_output), ("q", "k"))
        for ours, theirs in _arms_on(study, better, projections(worse))
    ]
    if not pairs:
        return _not_tested("No two arms are single attention projections.")
    return _compared(verdicts, pairs)


def _rank_helps_to_a_point(study: StudyRecord, verdicts: Verdicts) -> _Finding:
    pairs = []
    for lowest in study.arms:
        same = [arm for arm in study.arms if _names(arm) == _names(lowest) and arm.rank]
        highest = max(same, key=lambda arm: arm.rank or 0, default=lowest)
        is_lowest = all((lowest.rank or 0) <= (arm.rank or 0) for arm in same)
        if is_lowest and (highest.rank or 0) > (lowest.rank or 0) > 0:
            pairs.append((highest.name, lowest.name))
    if not pairs:
        return _not_tested("No two arms differ in rank alone.")
    return _compared(verdicts, pairs)


def _memory_is_in_the_place(study: StudyRecord) -> _Finding:
    pair = _equal_in_params(study, by_role("feed-forward"), projections("q", "v"))
    if pair is None:
        return _not_tested("No two arms of equal parameters are feed-forward and query with value.")
    ours, theirs = (arm_costs(study, arm).get("peak_memory_gib") for arm in pair)
    if ours is None or theirs is None:
        return _not_tested("Peak memory in training was not measured.")
    evidence = (
        f"{pair[0]} {amount_words('peak_memory_gib', ours.median)}, "
        f"{pair[1]} {amount_words('peak_memory_gib', theirs.median)} "
        f"({ours.median / theirs.median - 1:+.1%}){_over_seeds(ours, theirs)}."
    )
    if costs_more(ours, theirs):
        return _Finding("reproduced", evidence)
    if costs_more(theirs, ours):
        return _Finding("contradicted", evidence)
    return _Finding("not distinguishable", evidence)


def _over_seeds(ours: Cost, theirs: Cost) -> str:
    found = ratio_range(ours, theirs)
    if found is None:
        return "; no seed was run with both"
    low, high = found
    return f"; seed by seed {low - 1:+.1%} to {high - 1:+.1%}"


def _compared(verdicts: Verdicts, pairs: Sequence[tuple[str, str]]) -> _Finding:
    """Returns what the direct comparisons say; the first of each pair should be the better one."""
    found = [verdicts.pair(ours, theirs) for ours, theirs in dict.fromkeys(pairs)]
    comparisons = judged([comparison for comparison in found if comparison is not None])
    if not comparisons:
        return _not_tested("One of the two arms has no completed run.")
    seen = {comparison.verdict for comparison in comparisons}
    outcome: Outcome = "not distinguishable"
    if "worse" in seen:
        outcome = "contradicted"
    elif seen == {"better"}:
        outcome = "reproduced"
    evidence = " ".join(f"{c.arm}: {c.reason}" for c in comparisons)
    return _Finding(outcome, evidence, comparisons)


def _not_tested(why: str) -> _Finding:
    return _Finding("not tested", why)


def _attention_output(inventory: Inventory) -> Modules:
    return tuple(m for m in output_projections(inventory) if m.role == "attention")


def _arms_on(
    study: StudyRecord, ours: Selector, theirs: Selector
) -> list[tuple[ArmRecord, ArmRecord]]:
    """Returns every two arms of which one adapts exactly these modules, the other those."""
    return list(product(_arms_with(study, ours), _arms_with(study, theirs)))


def _arms_with(study: StudyRecord, select: Selector) -> list[ArmRecord]:
    try:
        wanted = {module.name for module in select(study.inventory)}
    except PlacementError:
        return []
    return [arm for arm in study.arms if wanted and _names(arm) == wanted]


def _names(arm: ArmRecord) -> set[str]:
    return {module["name"] for module in arm.modules}


def _equal_in_params(
    study: StudyRecord, ours: Selector, theirs: Selector
) -> tuple[str, str] | None:
    """Returns the names of the two arms that are closest in parameters, if they are close."""
    gaps = [
        (abs(math.log(a.trainable_params / b.trainable_params)), a.name, b.name)
        for a, b in _arms_on(study, ours, theirs)
    ]
    gap, mine, other = min(gaps, default=(math.inf, "", ""))
    return (mine, other) if gap <= math.log1p(_EQUAL_PARAMS_FRAC) else None

"""Why a published ordering may come out differently here."""

from __future__ import annotations

from collections.abc import Sequence

from loracle.analysis.orderings import Ordering
from loracle.records.study_folder import StudyRecord
from loracle.report.text.methods import num_epochs
from loracle.report.text.provenance import Provenance
from loracle.text import plural


def why_it_may_differ(
    orderings: Sequence[Ordering], study: StudyRecord, provenance: Provenance
) -> str:
    """Returns possible reasons why a published ordering differs here."""
    outcomes = {ordering.outcome for ordering in orderings}
    setting = _setting(study, provenance)
    if any(o.outcome == "not tested" and o.comparisons for o in orderings):
        return (
            f"An ordering whose source searched the learning rate is not tested by arms of unequal "
            f"rank at one rate, whichever way they differ there: {setting}."
        )
    if "contradicted" in outcomes:
        return (
            f"A contradiction here need not speak against the source: {setting}; most sources "
            f"trained larger models for longer, some with a learning rate tuned for each arm."
        )
    if "not distinguishable" in outcomes:
        return (
            f"Not distinguishable means that this study is too small to tell, not that the source "
            f"is wrong: {setting}."
        )
    if "reproduced" in outcomes:
        return f"What is reproduced here is reproduced in one setting: {setting}."
    return "No ordering could be tested with the arms of this study."


def _setting(study: StudyRecord, provenance: Provenance) -> str:
    train = study.study["config"]["train"]
    epochs = num_epochs(study)
    passes = "" if epochs is None else f" ({epochs:.2g} passes over the training set)"
    return (
        f"this is one model of {study.inventory.total_params / 1e6:,.0f} million parameters, "
        f"{plural(train['max_steps'], 'step')} of {plural(train['batch_size'], 'example')}{passes} "
        f"and {plural(len(provenance.seeds), 'seed')}"
    )

"""The difference in BLEU of two arms' answers as texts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from loracle.analysis.stats.bleu import answer_counts, paired_bleu_of_counts
from loracle.analysis.stats.difference import Difference

Arm = Sequence[Sequence[str]]
"""Answers of each seed."""


def paired_bleu(ours: Arm, theirs: Arm, references: Sequence[str], **design: Any) -> Difference:
    mine, others = (
        np.stack([answer_counts(answers, references) for answers in arm]) for arm in (ours, theirs)
    )
    return paired_bleu_of_counts(mine, others, **design)

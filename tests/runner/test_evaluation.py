"""When the loop validates, and that a config counts it."""

from types import SimpleNamespace

import pytest

from loracle.config.files import load_config
from loracle.runner.evaluation import _is_due


@pytest.mark.parametrize(
    ("max_steps", "every", "expected"),
    [(100, 50, 2), (100, 30, 4), (100, 100, 1), (100, 101, 1), (100, 0, 1), (1, 1, 1), (7, 1, 7)],
)
def test_a_config_counts_the_validations_that_the_loop_does(max_steps, every, expected):
    config = load_config(overrides=[f"train.max_steps={max_steps}", f"eval.every_steps={every}"])
    none_recorded = SimpleNamespace(evals=list)
    state = SimpleNamespace(step=0)
    run = SimpleNamespace(state=state, config=config, folder=none_recorded)
    assert _is_due(run)
    done = 0
    for state.step in range(1, max_steps + 1):
        done += _is_due(run)
    assert done == config.num_validations == expected

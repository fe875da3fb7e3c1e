"""Models of fewer layers: quicker to trace, and the logic is the same."""

import pytest

from loracle import sources


@pytest.fixture
def shallow(monkeypatch):
    """Returns a function that gives every model so many layers."""
    real = sources.model_architecture

    def cut(layers: int) -> None:
        monkeypatch.setattr(
            sources, "model_architecture", lambda name: real(name) | {"num_hidden_layers": layers}
        )

    return cut


STUDY = """\
question: Does it matter where?
base: demo
config:
  eval: {generate_batch_size: 2, max_new_tokens: 4, generate_examples: 8}
reference: all-linear
budget: equal-parameters
seeds: [0, 1]
arms:
  all-linear:
  last-third:
  strategic: {placement: {strategic: gradient-energy, keep_frac: 0.3333}}
"""


@pytest.fixture
def study(tmp_path):
    """The file of a study of three arms, one of which is chosen only when it runs."""
    file = tmp_path / "three.yaml"
    file.write_text(STUDY, encoding="utf-8")
    return str(file)

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

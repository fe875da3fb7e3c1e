"""Checks of a loaded base against the data and the settings of a run, before anything trains."""

from __future__ import annotations

from loracle.config.run import Config
from loracle.data import PreparedData
from loracle.errors import ModelError
from loracle.model.base import FrozenBase
from loracle.model.guard import require_long_rows
from loracle.model.limits import require_embedded, require_reach


def require_usable(base: FrozenBase, *, data: PreparedData, config: Config) -> None:
    """Checks that every token and every position that the run will use exists in the base.

    Raises:
        ModelError: Naming what does not, and the setting to change.
    """
    require_embedded(base, name=config.model)
    examples = [*data.train, *data.validation]
    rows = base.model.get_input_embeddings().weight.shape[0]
    largest = max(max(example.input_ids) for example in examples)
    if largest >= rows:
        raise ModelError(f"{config.model}: the data have token {largest} of {rows} that it knows")
    longest = max(example.num_tokens for example in examples)
    require_reach(
        base,
        tokens=longest,
        what="the longest sequences",
        remedy="set data.max_tokens to at most {}",
    )
    require_long_rows(base, tokens=longest)
    prompts = [example.num_prompt for example in data.validation[: config.eval.generate_examples]]
    if prompts:
        require_reach(
            base,
            tokens=max(prompts) + config.eval.max_new_tokens,
            what="the longest prompt and eval.max_new_tokens",
            remedy="lower data.max_tokens or eval.max_new_tokens, or set eval.generate_examples=0",
        )
    if config.measure.latency_trials:
        by_length = sorted(example.num_prompt for example in data.validation)
        require_reach(
            base,
            tokens=by_length[len(by_length) // 2] + config.measure.latency_new_tokens,
            what="the median prompt and measure.latency_new_tokens",
            remedy="lower measure.latency_new_tokens, or set measure.latency_trials=0",
        )

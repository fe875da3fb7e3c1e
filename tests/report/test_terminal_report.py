"""The table of a run: every figure of the result, n/a where there is none."""

import copy
import io

import pytest
from rich.console import Console

from loracle.records.result import parse_result
from loracle.report.terminal.run import result_view
from runs_fixture import load


def shown(result, *, width=120):
    """The table as text, its blanks run together."""
    file = io.StringIO()
    Console(file=file, width=width).print(result_view(parse_result(result, origin="here")))
    return [" ".join(line.split()) for line in file.getvalue().splitlines()]


@pytest.fixture
def result(finished):
    return load(finished / "result.json")


def test_quality_is_shown_before_and_after(result):
    text = shown(result)
    base, tuned = result["quality"]["base"], result["quality"]["tuned"]
    change = tuned["perplexity"] / base["perplexity"] - 1
    assert (
        f"perplexity {base['perplexity']:.3f} {tuned['perplexity']:.3f} {100 * change:+.1f} % "
        "12 examples, 146 tokens"
    ) in text
    assert f"BLEU {base['bleu']:.2f} {tuned['bleu']:.2f} " in "\n".join(text)
    assert "answers cut at the limit 100 % 100 % 4 greedy answers" in text


def test_cost_is_shown_with_its_units(result):
    text = shown(result)
    cost = result["efficiency"]
    clock, latency = cost["step_time_s"], cost["latency_ms_per_token"]
    assert "trainable parameters 24,576 46.86 % of the 52,448 of full fine-tuning" in text
    assert (
        f"time per step {clock['median']:.2f} s median of 6; quartiles {clock['p25']:.2f} to "
        f"{clock['p75']:.2f}"
    ) in text
    memory = f"{cost['peak_memory_gib']['train']:.2f}"
    assert f"peak memory, train {memory} GiB resident set of the process" in text
    first = f"{cost['latency_first_token_ms']['merged']:.0f}"
    merged = f"{latency['merged']:.1f}"
    assert f"latency, merged {merged} ms/token first token after {first} ms" in text


def test_each_criterion_has_its_verdict_and_its_evidence(result):
    result["criteria"]["efficiency"]["evidence"] = "[red]one[/red] [/nothing]"
    text = shown(result, width=500)
    assert f"convergence passed {result['criteria']['convergence']['evidence']}" in text
    reproducibility = result["criteria"]["reproducibility"]["evidence"]
    assert f"reproducibility not judged {reproducibility}" in text
    assert f"validation passed {result['criteria']['validation']['evidence']}" in text
    assert "efficiency failed [red]one[/red] [/nothing]" in text


def test_what_was_not_measured_is_na_everywhere(result):
    empty = copy.deepcopy(result)
    for quality in empty["quality"].values():
        for key in ("bleu", "chrf", "hit_limit_frac", "num_answers", "bleu_signature"):
            quality[key] = None
    cost = empty["efficiency"]
    cost["step_time_s"] = {"median": None, "p25": None, "p75": None, "num_steps": 0}
    cost["epoch_time_s"] = cost["throughput_tokens_per_s"] = None
    cost["peak_memory_gib"] = dict.fromkeys(cost["peak_memory_gib"]) | {"kind": "cuda_allocated"}
    for key in ("latency_ms_per_token", "latency_first_token_ms"):
        cost[key] = dict.fromkeys(cost[key])
    text = shown(empty)
    assert "BLEU n/a n/a n/a" in text
    assert "time per step n/a s median of 0; quartiles n/a to n/a" in text
    assert "peak memory, generate n/a GiB allocated on the GPU" in text
    assert "latency, base n/a ms/token first token after n/a" in text
    assert not any("None" in line for line in text)


def test_the_provenance_is_shown(result):
    text = "".join(shown(result, width=1000))
    assert result["signature"] in text
    assert result["quality"]["tuned"]["bleu_signature"] in text


def test_at_80_columns_no_figure_is_cut(result):
    text = "\n".join(shown(result, width=80))
    assert "…" not in text
    for figure in ("24,576", "52,448", f"{result['quality']['tuned']['perplexity']:.3f}"):
        assert figure in text

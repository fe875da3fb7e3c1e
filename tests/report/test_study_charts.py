"""Every figure: valid Vega-Lite, axes with units, and a sentence where there is nothing to draw."""

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.stats.simulated import ARMS, write_study
from loracle.analysis.comparison import Comparison
from loracle.analysis.costs import Cost
from loracle.analysis.stats.difference import Difference
from loracle.analysis.tradeoffs import ParetoArm
from loracle.records.study_folder import read_study
from loracle.report.figures.curve_charts import loss_figures
from loracle.report.figures.examples import example_figure
from loracle.report.figures.forest import forest_figure
from loracle.report.figures.maps import placement_figures, score_figures
from loracle.report.figures.palette import looks_of
from loracle.report.figures.tradeoffs import spread, tradeoff_figure
from loracle.report.figures.vega import as_altair, for_page, for_paper, svg_of, themed

UNITLESS = {"optimizer step", "trainable parameters", "layer", None}
UNITS = ("nats per token", "GiB", "MiB", ", s", "ms per token", "share of modules", "target tokens")


def all_figures(contents):
    figures = contents.figures
    found = {figure.name: figure for figure in (*figures.on_page(), *figures.on_paper())}
    return list(found.values())


def walk(tree):
    """Yields every mapping in a spec."""
    if isinstance(tree, dict):
        yield tree
        for value in tree.values():
            yield from walk(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from walk(value)


def rows_of(spec, key):
    """Returns the rows of the first data of a spec whose rows have ``key``."""
    for part in walk(spec):
        rows = part.get("data", {}).get("values", [])
        if rows and key in rows[0]:
            return rows
    return []


def with_few_rows(tree):
    """A spec with the first rows of its data: the schema allows any, and asks of each."""
    if isinstance(tree, (list, tuple)):
        return [with_few_rows(each) for each in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: value[:3] if key == "values" else with_few_rows(value) for key, value in tree.items()
    }


@pytest.mark.parametrize("which", ["contents", "bare_contents"])
def test_every_figure_is_valid_vega_lite(which, request):
    contents = request.getfixturevalue(which)
    drawn = [figure for figure in all_figures(contents) if figure.spec is not None]
    assert len(drawn) >= 6
    for figure in [*drawn, example_figure(contents.study)]:
        chart = as_altair(replace(figure, spec=with_few_rows(figure.spec)))
        assert chart.to_dict()["config"]["background"] == "transparent"


def test_a_single_validation_is_no_curve(tmp_path):
    folder = write_study(tmp_path, arms=ARMS[:2], num_examples=5, num_answers=0)
    for path in folder.glob("runs/*/evals.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        last = max(row["step"] for row in rows)
        kept = [json.dumps(row) for row in rows if row["step"] in (0, last)]
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")
    study = read_study(folder)
    looks = looks_of([arm.name for arm in study.arms], reference=study.reference)
    *_, validation = loss_figures(study, looks=looks)
    assert validation.absent == (
        "Every run was validated before and after training only: the tables have it."
    )


@pytest.mark.parametrize("which", ["contents", "bare_contents"])
def test_every_axis_of_numbers_names_its_unit(which, request):
    for figure in all_figures(request.getfixturevalue(which)):
        for part in walk(figure.spec or {}):
            for channel in ("x", "y"):
                axis = part.get(channel, {})
                if isinstance(axis, dict) and axis.get("type") == "quantitative":
                    title = axis["title"]
                    assert title in UNITLESS or any(unit in title for unit in UNITS), title


def test_a_panel_without_data_says_why(bare_contents):
    absent = {f.name: f.absent for f in all_figures(bare_contents) if f.spec is None}
    assert "No completed run measured" in absent["cost-latency-ms-per-token"]
    assert "Fewer than two arms" in absent["tradeoff-peak-memory-gib"]
    assert "none were computed" in absent["scores"]
    assert all(sentence.endswith(".") for sentence in absent.values())


def test_what_one_arm_did_not_measure_is_named_and_not_zero(bare_contents):
    figure = next(f for f in bare_contents.figures.costs if f.name == "cost-peak-memory-gib")
    assert "Not measured for full." in figure.caption
    assert [row["arm"] for row in rows_of(figure.spec, "median")] == ["all-linear"]


def test_one_seed_has_no_bands_and_no_intervals(bare_contents):
    for figure in (bare_contents.figures.forest, *bare_contents.figures.losses):
        assert '"area"' not in json.dumps(figure.spec)
    assert "no interval" in bare_contents.figures.forest.caption
    row = rows_of(bare_contents.figures.forest.spec, "verdict")[0]
    assert row["low"] is None
    assert row["shown"].endswith("(no interval)")


def test_the_forest_holds_what_the_verdicts_say(contents):
    rows = rows_of(contents.figures.forest.spec, "verdict")
    assert len(rows) == 8
    for row in rows:
        found = contents.verdicts.comparison(row["arm"])
        assert row["difference"] == found.difference
        assert (row["low"], row["high"]) == found.interval
        assert row["verdict"] == found.verdict
    assert [row["difference"] for row in rows] == sorted(row["difference"] for row in rows)


def compared(arm, difference):
    found = Difference(difference, 0.01, 5.0, difference - 0.01, difference + 0.01, 0.5, 3, 9, 0.5)
    return Comparison(arm, "ref", "loss_nats_per_token", found, None)


def test_the_noise_floor_is_a_band_only_where_it_was_measured_above_zero():
    effects = [compared("a", 0.01)]
    for floor, drawn in ((0.003, True), (0.0, False), (None, False)):
        figure = forest_figure(effects, reference="ref", noise_floor=floor, coverage=0.95)
        assert ('"rect"' in json.dumps(figure.spec)) == drawn
    assert "was not measured" in figure.caption


def test_without_a_comparison_there_is_no_forest():
    figure = forest_figure([], reference="ref", noise_floor=None, coverage=0.95)
    assert "none compares" in figure.absent


def point(arm, cost, difference):
    price = Cost("trainable_params", cost, cost, cost, {0: cost})
    return ParetoArm(arm, price, 1.0, compared(arm, difference), "efficient", (), "")


def test_equal_costs_are_a_sentence_and_not_a_panel():
    points = [point("a", 100_000.0, 0.0), point("b", 101_000.0, 0.1)]
    figure = tradeoff_figure(
        "t", points, coverage=0.95, title="trainable parameters", label="x", reference="a"
    )
    assert "nearly the same trainable parameters (100,000 to 101,000)" in figure.absent


def test_costs_far_apart_are_on_a_logarithmic_axis():
    points = [point("a", 1e5, 0.0), point("b", 1e8, 0.1)]
    figure = tradeoff_figure(
        "t", points, coverage=0.95, title="trainable parameters", label="x", reference="a"
    )
    assert '"log"' in json.dumps(figure.spec)
    near = [point("a", 1.0, 0.0), point("b", 2.0, 0.1)]
    figure = tradeoff_figure("t", near, coverage=0.95, title="step time", label="x", reference="a")
    assert '"log"' not in json.dumps(figure.spec)


def test_labels_of_twelve_equal_arms_do_not_overlap():
    points = [point(f"arm-{n}", 1.0 + n, 0.0) for n in range(12)]
    figure = tradeoff_figure(
        "t", points, coverage=0.95, title="step time", label="x, s", reference="arm-0"
    )
    ends = [row for row in rows_of(figure.spec, "end") if row["end"]]
    y_scale = figure.spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    per_px = (y_scale[1] - y_scale[0]) / figure.spec["height"]
    heights = sorted(row["loss"] / per_px for row in ends)
    gaps = [b - a for a, b in itertools.pairwise(heights)]
    assert min(gaps) >= 12.9


@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=14),
    st.floats(0.01, 0.5),
)
def test_spread_keeps_order_gap_and_bounds(positions, gap):
    found = spread(positions, gap=gap, low=-1.0, high=1.0)
    room = min(gap, 2 / max(1, len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda index: (positions[index], index))
    placed = [found[index] for index in order]
    assert all(b - a >= room - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1 - 1e-9
    assert placed[-1] <= 1 + 1e-9


def test_spread_leaves_what_is_apart_where_it_is():
    assert spread([0.5, -0.5], gap=0.1, low=-1, high=1) == pytest.approx([0.5, -0.5])


def test_a_map_has_one_cell_per_adapted_module(study):
    figures = placement_figures(study)
    for arm, figure in zip(study.arms, figures, strict=True):
        cells = rows_of(figure.spec, "rank")
        assert len(cells) == len(arm.modules)
        assert {cell["rank"] for cell in cells} == {arm.rank}
        assert f"rank {arm.rank}" in figure.caption
        floor = figure.spec["layer"][0]["data"]["values"]
        assert len(floor) == len(study.inventory.modules)


def test_full_fine_tuning_fills_the_map(bare_study):
    figure = placement_figures(bare_study)[1]
    cells = rows_of(figure.spec, "rank")
    assert len(cells) == len(bare_study.inventory.modules)
    assert {cell["shown"] for cell in cells} == {"every weight"}
    assert figure.caption.startswith("full fine-tuning")


def test_the_heat_map_is_shaded_by_rank_of_the_scores(study):
    figures = score_figures(study)
    assert [figure.title for figure in figures] == [f"Score: {name}" for name in study.scores]
    for figure, scores in zip(figures, study.scores.values(), strict=True):
        rows = rows_of(figure.spec, "above")
        assert len(rows) == len(scores)
        highest = max(rows, key=lambda row: row["score"])
        lowest = min(rows, key=lambda row: row["score"])
        assert (lowest["above"], highest["above"]) == (0, 1)


def test_page_colours_are_variables_and_paper_colours_are_not(contents):
    spec = contents.figures.forest.spec
    assert '"var(--bad)"' in json.dumps(for_page(spec))
    assert "var(" not in json.dumps(spec)


def test_paper_has_no_marks_that_only_a_pointer_finds(contents):
    training = contents.figures.losses[0].spec
    assert any(layer.get("name") == "hover" for layer in training["layer"])
    assert not any(layer.get("name") == "hover" for layer in for_paper(training)["layer"])


def test_an_svg_shows_every_arm_and_asks_for_nothing(contents, arm_names):
    svg = svg_of(themed(contents.figures.losses[0].spec))
    for arm in arm_names:
        assert f">{arm}<" in svg
    assert "href=" not in svg
    assert "url(http" not in svg


def test_examples_that_got_worse_are_counted(study):
    figure = example_figure(study)
    rows = rows_of(figure.spec, "tokens")
    worse = sum(row["tuned"] > row["untuned"] for row in rows)
    assert f"{worse} of {len(rows)}" in figure.caption


def test_a_chart_of_the_notebook_can_be_drawn(contents):
    import altair

    with altair.renderers.enable("svg"):
        for figure in (contents.figures.forest, *contents.figures.losses):
            bundle = as_altair(figure)._repr_mimebundle_(None, None)
            data = bundle[0] if isinstance(bundle, tuple) else bundle
            assert "<svg" in data["image/svg+xml"]

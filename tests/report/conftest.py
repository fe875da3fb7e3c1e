"""Studies and a report that the report's tests share, written once."""

import pytest

from analysis.stats.simulated import ARMS, SimulatedArm, simulated_study
from loracle.analysis.verdicts import judge
from loracle.report.contents import contents_of
from loracle.report.write import write_report


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Nine arms with three seeds each, and one run that failed."""
    return simulated_study(
        tmp_path_factory.mktemp("nine"), num_layers=12, unfinished=[("random", 2)]
    )


@pytest.fixture(scope="session")
def contents(study):
    return contents_of(study, judge(study))


@pytest.fixture(scope="session")
def bare_study(tmp_path_factory):
    """Two arms, one seed, no answers, no scores, no noise, no latency; one trains everything."""
    return simulated_study(
        tmp_path_factory.mktemp("bare"),
        arms=(
            SimulatedArm("all-linear", latency_ms=None),
            SimulatedArm("full", 0.01, is_full=True, latency_ms=None, peak_memory_gib=None),
        ),
        seeds=(0,),
        num_answers=0,
        repeats=0,
        extra_seeds=(),
        scores=False,
    )


@pytest.fixture(scope="session")
def bare_contents(bare_study):
    return contents_of(bare_study, judge(bare_study))


@pytest.fixture(scope="session")
def report(study, tmp_path_factory):
    """The folder of the report of ``study``."""
    return write_report(study.path, out=tmp_path_factory.mktemp("report") / "new").parent


@pytest.fixture(scope="session")
def arm_names():
    return [arm.name for arm in ARMS]

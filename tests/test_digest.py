"""Source digests: every file of the rooms they name counts, and a room that moved is an error."""

import shutil

import pytest

from loracle.digest import PACKAGE, code_digest
from loracle.engine.environment import ENGINE_SOURCES
from loracle.runner.trunk import TRUNK_SOURCES
from loracle.runner.untuned_cache import UNTUNED_SOURCES


@pytest.fixture
def package(tmp_path):
    """A copy of the package that may be edited."""
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(PACKAGE, tmp_path / "loracle", ignore=ignored)


@pytest.mark.parametrize("sources", [ENGINE_SOURCES, UNTUNED_SOURCES, TRUNK_SOURCES])
def test_an_edited_layer_makes_what_was_kept_stale(package, sources):
    before = code_digest(sources)
    assert code_digest(sources, package=package) == before
    for layer in sorted((package / "model" / "layers").glob("*.py")):
        source = layer.read_text()
        layer.write_text(f"{source}\n# edited\n")
        assert code_digest(sources, package=package) != before, layer.name
        layer.write_text(source)
    assert code_digest(sources, package=package) == before


@pytest.mark.parametrize("sources", [ENGINE_SOURCES, UNTUNED_SOURCES, TRUNK_SOURCES])
def test_code_that_changes_no_number_keeps_it(package, sources):
    for name in ("report/write.py", "cli/main.py", "text.py"):
        (package / name).write_text("# edited\n")
    assert code_digest(sources, package=package) == code_digest(sources)


@pytest.mark.parametrize("pattern", ["model/*.txt", "layers/**/*.py", "evaluate.py"])
def test_a_pattern_without_a_file_is_an_error(pattern):
    with pytest.raises(FileNotFoundError, match="no source file matches"):
        code_digest(["model/**/*.py", pattern])

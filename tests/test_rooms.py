"""Placements, configurations and reports need no torch: their commands run where it is missing."""

import os
import subprocess
import sys

import pytest

from loracle.digest import PACKAGE

REPOSITORY = PACKAGE.parents[1]
WITHOUT_TORCH = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "peft"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Missing())
from loracle.cli.main import main
main()
"""


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("report results/demo --markdown", "Signature: `model:smollm2-135m@"),
        ("report results/placement_study --markdown", "| last-third |"),
        ("config demo", "max_steps: "),
        ("placements llama-2-7b", "39,976,960"),
    ],
)
def test_the_command_runs_without_torch(command, part):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command.split()],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    # The records of this repository are older than manifests.
    said = [line for line in done.stderr.splitlines() if "cannot be verified" not in line]
    assert (done.returncode, said) == (0, [])
    assert part in done.stdout

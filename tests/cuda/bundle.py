"""python bundle.py CONFIG OUT - two placements and two seeds in one bundle, on a card."""

import sys
from pathlib import Path

from loracle import RunSpec, load_config, run_many

if __name__ == "__main__":
    config, out = sys.argv[1], Path(sys.argv[2])
    specs = [
        RunSpec(
            load_config(config, overrides=[f"lora.placement={placement}", f"seed={seed}"]),
            out / f"{placement}-{seed}",
        )
        for placement in ("all-linear", "attention")
        for seed in (0, 1)
    ]
    outcomes = run_many(specs, bundle_size=4)
    for outcome in outcomes:
        print(outcome.out.name, outcome.error or "done")
    sys.exit(any(outcome.error for outcome in outcomes))

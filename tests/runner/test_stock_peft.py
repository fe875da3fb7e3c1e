"""The saved adapter, in the hands of somebody who has never heard of LoRAcle."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from runs_fixture import load

SCRIPT = Path(__file__).parents[2] / "experiments" / "reload_with_stock_peft.py"
# Makes any import of the package an error, whatever the script says of itself.
ALONE = "import runpy, sys; sys.modules['loracle'] = None; runpy.run_path(sys.argv.pop(1))"


def reload(run, *, model, environment=None):
    """Runs the script in a process of its own; returns what it prints and both losses."""
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(SCRIPT), str(run), str(model)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    recorded, reloaded = (float(loss) for loss in re.findall(r"ed  ([\d.]+) nats", done.stdout))
    return done.stdout, recorded, reloaded


def test_stock_peft_gives_the_recorded_validation_loss(finished, place):
    out, recorded, reloaded = reload(finished, model=place.model, environment=place.environment)
    quality = load(finished / "result.json")["quality"]["tuned"]
    assert out.startswith("12 validation examples, 146 tokens, float32\n")
    assert recorded == pytest.approx(quality["loss_nats_per_token"], abs=1e-8)
    assert reloaded == pytest.approx(quality["loss_nats_per_token"], rel=1e-5)
    base = load(finished / "result.json")["quality"]["base"]["loss_nats_per_token"]
    assert abs(reloaded - base) > 100 * abs(reloaded - recorded)


def test_the_script_does_not_use_the_package():
    imports = re.findall(r"^(?:from|import) (\w+)", SCRIPT.read_text(), re.MULTILINE)
    assert "peft" in imports
    assert "loracle" not in imports


def test_the_adapters_files_are_pefts_own_and_say_what_was_trained(finished):
    from peft import LoraConfig
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(finished / "adapter")
    modules = {module["name"] for module in load(finished / "modules.json")["modules"]}
    tensors = load_file(finished / "adapter" / "adapter_model.safetensors")
    assert {
        name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in tensors
    } == modules
    assert len(tensors) == 2 * len(modules)
    # PEFT itself shortens a list of 20 modules or more to endings that mean the same.
    assert all(name.endswith(tuple(config.target_modules)) for name in modules)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32.0, 0.1)
    assert (config.task_type, config.bias) == ("CAUSAL_LM", "none")
    assert config.base_model_name_or_path == "path:../../../inputs/model"
    written = json.loads((finished / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"])

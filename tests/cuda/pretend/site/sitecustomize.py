"""Each Python process of a command on a pretended card starts here, spawned children too.

Once torch is imported, its answers are made up (answers.py). At the end what the card was asked is
appended to ``PRETEND_REPORT``, one JSON object a line.
"""

import atexit
import importlib.abc
import importlib.util
import json
import os
import sys
from pathlib import Path


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Lets torch be found as ever, and installs the answers when it has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_install(module):
            execute(module)
            _install()

        spec.loader.exec_module = execute_and_install
        return spec


def _install():
    sys.path.append(str(Path(__file__).parents[1]))
    import answers
    import torch

    answers.install()
    if os.environ.get("PRETEND_CUDNN") == "off":
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "PRETEND_REPORT" in os.environ:
        atexit.register(_report, answers)


def _report(answers):
    import torch

    started = torch.cuda.is_initialized()
    row = {
        "argv": sys.argv,
        **answers.counts(),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if started else None,
        "wait_lines": dict(answers.waits.most_common()),
    }
    with Path(os.environ["PRETEND_REPORT"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if "PRETEND_CARD" in os.environ:
    sys.meta_path.insert(0, _AfterTorch())

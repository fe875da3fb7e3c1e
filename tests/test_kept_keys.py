"""Keys of kept values: whatever a value is computed from changes its key, and nothing else does.

One table of changes for every kind of value that a base computes, one for those without a base.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from loracle import digest
from loracle.config.run import TemplateConfig
from loracle.data import encode_prompts, template_of
from loracle.data.records import Record
from loracle.digest import Inputs, digest_of, key_of
from loracle.engine.environment import capture_environment
from loracle.errors import RunFolderError
from loracle.forecast import calibration
from loracle.forecast.shape_cache import CachedShapes
from loracle.model.identity import BaseIdentity, described_config, identify
from loracle.runner import trunk, untuned_cache
from loracle.runner.progress import Progress
from loracle.runner.trunk import state_key
from loracle.runner.untuned_cache import answer_key, score_key
from loracle.sources import ResolvedSource
from loracle.sources import cache as sources_cache
from loracle.sources.cache import conversion_key
from loracle.study import scoring
from loracle.study.scoring import scores_key
from tiny import save_tiny_model
from tiny_engine import examples_of, tiny_base

EXAMPLES = examples_of(3)
RECORD = Record(row=0, instruction="Name a river.", input="", output="")


@cache
def environment() -> dict:
    return capture_environment(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("kept") / "model")


def identity_of(folder: Path) -> BaseIdentity:
    """The identity of the model in a folder, its weights aside, as loading it gives."""
    base = replace(tiny_base(), tokenizer=AutoTokenizer.from_pretrained(folder))
    base.model.config = AutoConfig.from_pretrained(folder)
    return identify(base, folder=folder, weights_digest="bits")


@dataclass(frozen=True)
class Asked:
    """What a base is asked for, and where."""

    identity: BaseIdentity
    environment: Mapping = field(default_factory=environment)
    examples: tuple = tuple(EXAMPLES)
    prompts: tuple = ((3, 4, 5), (6, 7))

    def keys(self) -> dict[str, str]:
        """The keys of all that is kept of the base."""
        given = {"environment": self.environment}
        return {
            "scores": score_key(self.identity, self.examples, batch_tokens=64, **given),
            "answers": answer_key(
                self.identity, self.prompts, max_new_tokens=8, batch_size=4, **given
            ),
            "states": state_key(1, identity=self.identity, **given),
        }


def edited(folder: Path, file: str, **changes: object) -> None:
    """Changes keys of a JSON file of a model; dots lead into objects."""
    path = folder / file
    tree = json.loads(path.read_text())
    for key, value in changes.items():
        *above, last = key.split("__")
        inner = tree
        for name in above:
            inner = inner[name]
        inner[last] = value
    path.write_text(json.dumps(tree))


CONFIG = "config.json"
IN_THE_FOLDER = {
    "norm epsilon": partial(edited, file=CONFIG, rms_norm_eps=0.5),
    "rope theta": partial(edited, file=CONFIG, rope_parameters__rope_theta=500.0),
    "rope scaling": partial(
        edited,
        file=CONFIG,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    ),
    "activation": partial(edited, file=CONFIG, hidden_act="relu"),
    "a key of another architecture": partial(edited, file=CONFIG, final_logit_softcapping=30.0),
    "attention scaling": partial(edited, file=CONFIG, query_pre_attn_scalar=12),
    "ends of answers": partial(edited, file="generation_config.json", eos_token_id=[1, 2]),
    "generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "rules of the tokenizer": partial(edited, file="tokenizer.json", pre_tokenizer=None),
    "post-processor": partial(edited, file="tokenizer.json", post_processor=None),
    "eos": partial(edited, file="tokenizer_config.json", eos_token="<s>"),
    "added token": partial(edited, file="tokenizer_config.json", extra_special_tokens=["<|turn|>"]),
    "chat template": lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"),
}


@pytest.mark.parametrize("change", IN_THE_FOLDER.values(), ids=IN_THE_FOLDER)
def test_whatever_the_model_folder_says_changes_every_key(model, tmp_path, change):
    folder = Path(shutil.copytree(model, tmp_path / "changed"))
    change(folder)
    before, after = Asked(identity_of(model)).keys(), Asked(identity_of(folder)).keys()
    assert [kind for kind in before if before[kind] == after[kind]] == []


def test_the_place_and_the_writer_of_the_model_change_no_key(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "elsewhere" / "renamed"))
    edited(folder, CONFIG, transformers_version="4.0.0", _name_or_path="/somewhere")
    edited(folder, "generation_config.json", transformers_version="4.0.0")
    (folder / "README.md").write_text("another card")
    assert Asked(identity_of(folder)).keys() == Asked(identity_of(model)).keys()


def _with_device(**changes: object) -> dict:
    return environment() | {"device": environment()["device"] | changes}


BESIDE_THE_FOLDER: dict[str, Callable[[Asked], Asked]] = {
    part.name: lambda asked, name=part.name: replace(
        asked, identity=replace(asked.identity, **{name: "another"})
    )
    for part in fields(BaseIdentity)
} | {
    f"{part} {name}": lambda asked, part=part, name=name, value=value: replace(
        asked, environment=environment() | {part: environment()[part] | {name: value}}
    )
    for part, name, value in (
        ("device", "name", "Another CPU"),
        ("device", "quantization", "nf4"),
        ("versions", "torch", "0"),
        ("versions", "transformers", "0"),
        ("versions", "peft", "0"),
        ("versions", "tokenizers", "0"),
        ("torch_settings", "num_threads", 99),
        ("torch_settings", "float32_matmul_precision", "medium"),
        ("torch_settings", "mkldnn_enabled", "no"),
    )
}


@pytest.mark.parametrize("change", BESIDE_THE_FOLDER.values(), ids=BESIDE_THE_FOLDER)
def test_identity_and_machine_change_every_key(change):
    asked = Asked(BaseIdentity("w", "c", "g", "t", "float32", None))
    before, after = asked.keys(), change(asked).keys()
    assert [kind for kind in before if before[kind] == after[kind]] == []


def test_date_and_free_memory_change_no_key():
    asked = Asked(BaseIdentity("w", "c", "g", "t", "float32", None))
    later = environment() | {"captured_at": "later", "memory_gib": 1.0}
    assert replace(asked, environment=later).keys() == asked.keys()
    assert {len(key) for key in asked.keys().values()} == {64}


def test_other_code_changes_every_key(monkeypatch):
    asked = Asked(BaseIdentity("w", "c", "g", "t", "float32", None))
    before = asked.keys()
    monkeypatch.setattr(untuned_cache, "source_digest", lambda: "edited")
    monkeypatch.setattr(trunk, "trunk_digest", lambda: "edited")
    after = asked.keys()
    assert [kind for kind in before if before[kind] == after[kind]] == []


def test_what_is_asked_changes_the_key():
    identity = BaseIdentity("w", "c", "g", "t", "float32", None)
    given = {"environment": environment()}
    longer = replace(EXAMPLES[0], num_prompt=2 + EXAMPLES[0].num_prompt)
    scores = [
        score_key(identity, examples, batch_tokens=tokens, **given)
        for examples, tokens in (
            (EXAMPLES, 64),
            (EXAMPLES, 65),
            (EXAMPLES[::-1], 64),
            (EXAMPLES[1:], 64),
            ([longer, *EXAMPLES[1:]], 64),
        )
    ]
    answers = [
        answer_key(identity, prompts, max_new_tokens=new, batch_size=size, **given)
        for prompts, new, size in (
            ([(3, 4, 5), (6, 7)], 8, 4),
            ([(3, 4), (5, 6, 7)], 8, 4),
            ([(3, 4, 5), (6, 7)], 9, 4),
            ([(3, 4, 5), (6, 7)], 8, None),
        )
    ]
    states = [state_key(layer, identity=identity, **given) for layer in (1, 2)]
    keys = [*scores, *answers, *states]
    assert len(set(keys)) == len(keys)


def test_a_template_shows_in_the_token_ids():
    tokenizer = tiny_base().tokenizer
    form = TemplateConfig(with_input="{instruction} {input}", without_input="Q {instruction}")
    ids = [
        encode_prompts([RECORD], template=template_of(template), tokenizer=tokenizer)
        for template in ("alpaca", form)
    ]
    assert ids[0] != ids[1]


def test_other_bits_names_or_shapes_are_other_weights():
    digests = [tiny_base(dtype=dtype).weights_digest() for dtype in (torch.float32, torch.bfloat16)]
    base = tiny_base()
    with torch.no_grad():
        next(base.model.parameters()).view(-1)[0].add_(1e-3)
    assert len({*digests, base.weights_digest()}) == 3


def test_the_attention_that_runs_is_no_part_of_the_configuration():
    """It changes while a run decodes."""
    base = tiny_base()
    before = described_config(base.model.config)
    with base.generating(()):
        assert described_config(base.model.config) == before
    assert described_config(copy.deepcopy(base.model.config)) == before


INPUTS = Inputs(
    weights="w", config="c", generation="g", tokenizer="t", dtype="float32", quantization=None,
    device={"name": "cpu"}, versions={"torch": "2"}, code="k", asked={"layer": 1},
)  # fmt: skip


@pytest.mark.parametrize("name", [part.name for part in fields(Inputs)])
def test_each_input_is_in_the_key(name):
    assert key_of("kind", replace(INPUTS, **{name: {"other": 1}})) != key_of("kind", INPUTS)
    assert key_of("another kind", INPUTS) != key_of("kind", INPUTS)


def test_the_order_of_keys_is_nothing():
    assert digest_of({"a": 1, "b": [1, 2]}) == digest_of({"b": [1, 2], "a": 1})
    assert digest_of([1, 2]) != digest_of([2, 1])


def test_a_conversion_is_kept_by_file_member_converter_and_versions(monkeypatch):
    keys = [conversion_key("a"), conversion_key("b"), conversion_key("a", member="x.gguf")]
    monkeypatch.setattr(sources_cache, "package_version", lambda name: f"{name} 0")
    keys.append(conversion_key("a"))
    monkeypatch.setattr(sources_cache, "_conversion_digest", lambda: "edited")
    keys.append(conversion_key("a"))
    assert len(set(keys)) == len(keys)


def test_a_speed_is_kept_by_device_dtype_threads_settings_code_and_what_was_timed(monkeypatch):
    ask = calibration.calibration_key
    keys = [ask("a", "float32", 1), ask("b", "float32", 1), ask("a", "bfloat16", 1)]
    keys.append(ask("a", "float32", 2))
    monkeypatch.setattr(calibration, "_BATCH", [(1, 1)])
    keys.append(ask("a", "float32", 1))
    monkeypatch.setattr(calibration, "torch_settings", lambda: {"mkldnn_enabled": None})
    keys.append(ask("a", "float32", 1))
    monkeypatch.setattr(calibration, "package_version", lambda _: "0")
    keys.append(ask("a", "float32", 1))
    monkeypatch.setattr(calibration, "_source_digest", lambda: "edited")
    keys.append(ask("a", "float32", 1))
    assert len(set(keys)) == len(keys)


def test_the_code_of_a_speed_a_conversion_and_a_score_is_found():
    for sources in (
        calibration.CALIBRATION_SOURCES,
        sources_cache.CONVERSION_SOURCES,
        scoring.SCORE_SOURCES,
    ):
        assert len(digest.code_digest(sources)) == 64


def test_all_code_that_converts_is_in_the_key_of_a_conversion():
    patterns = sources_cache.CONVERSION_SOURCES
    hashed = {path for pattern in patterns for path in digest.PACKAGE.glob(pattern)}
    imports = re.compile(r"^from loracle\.sources\.(\w+) import", re.MULTILINE)
    names = {name for path in hashed for name in imports.findall(path.read_text())}
    assert {digest.PACKAGE / "sources" / f"{name}.py" for name in names} <= hashed


def _cached_shapes(call: Callable[[], object]) -> int:
    """How many shapes a call adds to those of a product of two by three and three by four."""
    with CachedShapes() as mode:
        a, b = torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")
        torch.mm(a, b)
        before = len(mode._cached)
        call()
        return len(mode._cached) - before


@pytest.mark.parametrize(
    ("changed", "added"),
    [
        (lambda: torch.mm(torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")), 0),
        (lambda: torch.mm(torch.empty(5, 3, device="meta"), torch.empty(3, 4, device="meta")), 1),
        (
            lambda: torch.mm(
                torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta").t()
            ),
            1,
        ),
        (
            lambda: torch.mm(
                torch.empty(2, 3, device="meta", dtype=torch.float64),
                torch.empty(3, 4, device="meta", dtype=torch.float64),
            ),
            1,
        ),
    ],
    ids=["the same", "shape", "stride", "dtype"],
)
def test_a_traced_shape_is_kept_by_what_decides_it(changed, added):
    assert _cached_shapes(changed) == added


def test_a_traced_shape_is_kept_by_the_default_dtype():
    def divided() -> torch.dtype:
        return torch.true_divide(torch.empty(2, device="meta", dtype=torch.int64), 2).dtype

    with CachedShapes():
        first = divided()
        torch.set_default_dtype(torch.float64)
        try:
            second = divided()
        finally:
            torch.set_default_dtype(torch.float32)
    assert (first, second) == (torch.float32, torch.float64)


STUDY = """\
question: Where?
base: demo
reference: all
budget: equal-parameters
seeds: [0, 1]
arms:
  all: {placement: all-linear}
  best: {placement: {strategic: gradient-energy, keep_frac: 0.3}}
"""


@pytest.fixture
def strategic(tmp_path, monkeypatch):
    """A study with an arm chosen by score, whose sources resolve to what a test says."""
    from loracle import sources
    from loracle.study.file import load_study

    (tmp_path / "s.yaml").write_text(STUDY)
    study, base = load_study(str(tmp_path / "s.yaml"))
    for kind in ("model", "data"):
        resolved = ResolvedSource(tmp_path, f"path:{kind}", f"sha256:{kind}")
        monkeypatch.setattr(sources, f"resolve_{kind}", lambda *_, given=resolved, **__: given)
    return study, base


def test_module_scores_are_kept_by_model_data_settings_and_code(strategic, monkeypatch, tmp_path):
    from loracle import sources

    study, base = strategic
    lora = base.model_copy(update={"lora": base.lora.model_copy(update={"rank": 3})})
    data = base.model_copy(update={"data": base.data.model_copy(update={"max_tokens": 99})})
    train = base.model_copy(update={"train": base.train.model_copy(update={"batch_size": 3})})
    dtype = base.model_copy(update={"dtype": "float16"})
    keys = [
        scores_key(study, base=one, progress=Progress()) for one in (base, lora, data, train, dtype)
    ]
    later = study.model_copy(update={"seeds": (1, 0)})
    keys.append(scores_key(later, base=base, progress=Progress()))
    for kind in ("model", "data"):
        other = ResolvedSource(tmp_path, "path:other", "sha256:other")
        monkeypatch.setattr(sources, f"resolve_{kind}", lambda *_, given=other, **__: given)
        keys.append(scores_key(study, base=base, progress=Progress()))
    monkeypatch.setattr(scoring, "code_digest", lambda _: "edited")
    keys.append(scores_key(study, base=base, progress=Progress()))
    assert len(set(keys)) == len(keys)


def test_module_scores_of_other_inputs_are_not_taken(strategic, monkeypatch, tmp_path, capsys):
    study, base = strategic
    monkeypatch.setattr(scoring, "_score", lambda *_, **__: {"gradient-energy": {"m": 2.0}})
    kept = {"schema": 1, "steps": 4, "scores": {"gradient-energy": {"m": 1.0}}}
    given = {"base": base, "kinds": ["gradient-energy"], "out": tmp_path, "progress": Progress()}

    def obtained(**recorded: str) -> float:
        (tmp_path / "scores.json").write_text(json.dumps(kept | recorded))
        scores, _ = scoring.module_scores(study, **given)
        return scores["gradient-energy"]["m"]

    key = scores_key(study, base=base, progress=Progress())
    assert obtained(key=key) == 1.0
    assert capsys.readouterr().err == ""
    assert obtained() == 1.0
    assert "not verified" in capsys.readouterr().err
    assert obtained(key="of another model") == 2.0
    assert "computing it again" in capsys.readouterr().err
    (tmp_path / "runs" / "all-s0").mkdir(parents=True)
    (tmp_path / "runs" / "all-s0" / "modules.json").write_text("{}")
    with pytest.raises(RunFolderError, match="scored with another model"):
        obtained(key="of another model")

"""Config files are read strictly, merged over one table, and every fault is reported at once."""

from pathlib import Path

import pytest
import yaml

from loracle.config import files as configfile
from loracle.config.faults import NAMES_ELSEWHERE, dotted_keys
from loracle.config.files import (
    dump_yaml,
    find_config,
    load_config,
    parse_config,
    read_yaml,
    shipped_config,
    shipped_configs,
)
from loracle.config.printed import commented_yaml
from loracle.config.run import Config, PlacementConfig, TemplateConfig
from loracle.errors import ConfigError

BASE = load_config()


def fault_of(text: str, tmp_path: Path) -> str:
    """The message for a config file, which must be one line that names it."""
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith("mine.yaml:")
    assert "\n" not in message
    return message.removeprefix("mine.yaml:").strip()


def loaded(text: str, tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


RUNS = [name for name, path in shipped_configs().items() if "arms" not in read_yaml(path)]


@pytest.mark.parametrize("name", RUNS)
def test_every_shipped_config_loads_by_its_name(name):
    assert load_config(name) == load_config(shipped_configs()[name])


def test_what_ships():
    assert {"base_config", "demo"} <= set(shipped_configs())
    assert "model_configs" not in shipped_configs()
    assert shipped_config("model_configs").is_file()


@pytest.mark.parametrize("name", set(RUNS) - {"base_config"})
def test_a_shipped_config_says_only_what_differs(name):
    def repeated(overlay: dict, base: dict, prefix: str = "") -> list[str]:
        found = []
        for key, value in overlay.items():
            if isinstance(value, dict):
                found += repeated(value, base[key], f"{prefix}{key}.")
            elif value == base[key]:
                found.append(prefix + key)
        return found

    assert repeated(read_yaml(shipped_configs()[name]), BASE.model_dump()) == []


def test_a_file_holds_only_what_differs(tmp_path):
    config = loaded("train: {max_steps: 7}\nseed: 3\n", tmp_path)
    assert (config.train.max_steps, config.seed) == (7, 3)
    assert config.train.batch_size == BASE.train.batch_size
    assert loaded("", tmp_path) == loaded("# nothing but a comment\n", tmp_path) == BASE


@pytest.mark.parametrize(
    ("written", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("1.5e-3", 1.5e-3), (".5e-2", 5e-3)]
)
def test_a_number_with_an_exponent_is_a_number(written, value, tmp_path):
    assert loaded(f"train: {{learning_rate: {written}}}", tmp_path).train.learning_rate == value


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("trian: {max_steps: 3}", "trian: unknown key; did you mean 'train'?"),
        (
            "train: {learning_rte: 1}",
            "train.learning_rte: unknown key; did you mean 'learning_rate'?",
        ),
        (
            "data: {columns: {imput: x}}",
            "data.columns.imput: unknown key; did you mean 'input'?",
        ),
        (
            "lora: {placement: {modulse: [q_proj]}}",
            (
                "lora.placement.modules: missing; "
                "lora.placement.modulse: unknown key; did you mean 'modules'?"
            ),
        ),
        ("lora: {r: 8}", "lora.r: unknown key; did you mean 'lora.rank'?"),
        ("lora: {lora_alpha: 8}", "lora.lora_alpha: unknown key; did you mean 'lora.alpha'?"),
        (
            "lora: {target_modules: []}",
            "lora.target_modules: unknown key; did you mean 'lora.placement'?",
        ),
        (
            "lora: {placement: {target_modules: [q_proj]}}",
            (
                "lora.placement.modules: missing; "
                "lora.placement.target_modules: unknown key; "
                "did you mean 'lora.placement.modules'?"
            ),
        ),
        ("train: {lr: 1}", "train.lr: unknown key; did you mean 'train.learning_rate'?"),
        (
            "train: {num_train_epochs: 1}",
            (
                "train.num_train_epochs: unknown key; "
                "did you mean 'train.max_steps' (optimizer steps)?"
            ),
        ),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean 'train.learning_rate'?"),
        ("rank: 1", "rank: unknown key; did you mean 'lora.rank'?"),
        ("keep: 1", "keep: unknown key; did you mean 'checkpoint.keep'?"),
        (
            "every_steps: 1",
            (
                "every_steps: unknown key; "
                "did you mean 'eval.every_steps' or 'checkpoint.every_steps'?"
            ),
        ),
        ("zzz: 1", "zzz: unknown key"),
        ("train: {zzz: {a: 1}}", "train.zzz: unknown key"),
        ("list: 1", "list: unknown key"),
        ("'a\\nb': 1\n\"c\\nd\": 2", "a\\nb: unknown key; c d: unknown key"),
    ],
)
def test_an_unknown_key_and_the_nearest_one(text, fault, tmp_path):
    assert fault_of(text, tmp_path) == fault


def test_every_name_of_other_libraries_leads_to_a_key_of_ours():
    ours = set(dotted_keys(Config))
    assert set(NAMES_ELSEWHERE) <= ours
    assert ours.isdisjoint(" ".join(NAMES_ELSEWHERE.values()).split())


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: true", "seed: input should be a valid integer, got True"),
        ("seed: -1", "seed: input should be greater than or equal to 0, got -1"),
        ("train: {max_steps: '3'}", "train.max_steps: input should be a valid integer, got '3'"),
        ("lora: {rank: 1.5}", "lora.rank: input should be a valid integer, got 1.5"),
        ("lora: {dropout: 1}", "lora.dropout: input should be less than 1, got 1"),
        ("train: {learning_rate: .inf}", "train.learning_rate: input should be a finite number"),
        ("train: {learning_rate: .nan}", "train.learning_rate: input should be a finite number"),
        ("train: {learning_rate: 2 e-4}", "train.learning_rate: input should be a valid number"),
        ("dtype: bf16", "got 'bf16'; did you mean 'bfloat16'?"),
        ("tracking: {mode: off}", "'offline' or 'disabled', got 'off'; did you mean 'offline'?"),
        ("device: gpu", "device: must be auto, cpu, cuda, or cuda:N for GPU number N, got 'gpu'"),
        ("train: 3", "train: must be a section of 'key: value' lines, got 3"),
        ("train:", "train: must be a section of 'key: value' lines, got None"),
        ("model: 2024", "model: input should be a valid string, got 2024"),
        ("train: {max_steps: 1e3}", "train.max_steps: input should be a valid integer, got 1000.0"),
        ("train: {max_steps: 1_0}", "train.max_steps: input should be a valid integer, got '1_0'"),
        ("train: {max_steps: 1:30}", "max_steps: input should be a valid integer, got '1:30'"),
        ("train: {max_steps: 3000000000}", "max_steps: input should be less than 2147483648"),
        ("train: {gradient_checkpointing: yes}", "input should be a valid boolean, got 'yes'"),
        ("train: {trunk: false}", "train.trunk: input should be 'auto' or 'off', got False"),
        (
            "lora: {placement: 3}",
            "lora.placement: must be a preset's name or a mapping with modules and layers, got 3",
        ),
        (
            "lora: {placement: {modules: [q_proj], layers: [0, -1]}}",
            "lora.placement.layers.1: input should be greater than or equal to 0, got -1",
        ),
        ("lora: {placement: {modules: []}}", "lora.placement.modules: list should have at least 1"),
        (
            "data: {template: llama}",
            "must be alpaca or a mapping with with_input and without_input, got 'llama'",
        ),
        (
            "data: {template: {with_input: x, without_input: y}}",
            "data.template: with_input must contain {instruction} and {input}, got {",
        ),
        (
            "data: {template: {with_input: '{instruction} {input}', without_input: y}}",
            "data.template: without_input must contain {instruction}, got {",
        ),
    ],
)
def test_a_wrong_value_says_what_is_allowed_and_what_was_given(text, fault, tmp_path):
    found = fault_of(text, tmp_path)
    assert fault in found
    assert "; " not in found.replace("; did you mean", "")


def test_every_fault_is_reported_at_once(tmp_path):
    text = "train: {max_steps: 0, batch_sise: 2}\nlora: {rank: x}\nfoo: 1\n"
    found = fault_of(text, tmp_path)
    for key in ("train.max_steps", "train.batch_sise", "lora.rank", "foo"):
        assert f"{key}: " in found
    assert found.count("; ") == 4  # three between faults, one before "did you mean"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: 1\nseed: 2", "2: key 'seed' is given twice"),
        ("train:\n  max_steps: 1\n  max_steps: 2", "3: key 'max_steps' is given twice"),
        ("1: 2", "1: key 1 is not a word"),
        ("[a]: 2", "1: a list or mapping cannot be a key"),
        ("- 1\n- 2", "must be 'key: value' lines, got list"),
        ("hello", "must be 'key: value' lines, got str"),
        ("a: [1", "1: expected ',' or ']'"),
        ("\ta: 1", "1: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "2: but found another document"),
        ("a: !!python/object:os.system x", "1: could not determine a constructor"),
        ("a: \x00", "not valid YAML (unacceptable character"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(text, fault, tmp_path):
    assert fault_of(text, tmp_path).startswith(fault)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"seed: 1\nmodel: \xe9\n")
    with pytest.raises(ConfigError, match=r"^mine\.yaml: not UTF-8 at byte 15$"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('model: "path:\\e[2J"', "x.yaml: model: holds the character U+001B"),
        ('question: "\\ud800"', "x.yaml: question: holds the character U+D800"),
        ('question: "\\u202Egpj"', "x.yaml: question: holds the character U+202E"),
        ('lora: {ranks: {"q\\0": 1}}', "x.yaml: lora.ranks: holds the character U+0000"),
        ('arms: [{a: "\\a"}]', "x.yaml: arms.0.a: holds the character U+0007"),
    ],
)
def test_a_text_that_would_act_where_it_is_shown_is_refused(text, fault, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        configfile.read_yaml(path)
    assert str(caught.value).startswith(fault)


def test_texts_of_every_script_with_lines_and_tabs_are_texts(tmp_path):
    text = "naïve\t漢字\n👩‍👩‍👧"
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"a": text}, allow_unicode=True))
    assert configfile.read_yaml(path) == {"a": text}


def test_a_byte_order_mark_is_no_fault(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert load_config(path).seed == 3


def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1")

    def denied(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"^mine\.yaml: cannot be read \(Permission denied\)$"):
        read_yaml(path)


def test_a_config_that_is_nowhere_names_those_that_ship(tmp_path):
    with pytest.raises(ConfigError) as caught:
        find_config("base_cofnig")
    message = str(caught.value)
    assert message.startswith("config 'base_cofnig': no such file, and no shipped config of that")
    assert "base_config, demo" in message
    assert message.endswith("; did you mean 'base_config'?")
    with pytest.raises(ConfigError, match="no such file"):
        find_config(tmp_path)


def test_a_file_comes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("seed: 11")
    assert load_config("demo").seed == 11


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_steps=5", "train.max_steps", 5),
        ("train.learning_rate=2e-4", "train.learning_rate", 2e-4),
        ("data.max_records=null", "data.max_records", None),
        ("data.max_records=", "data.max_records", None),
        (" seed = 4", "seed", 4),
        ("model=path:a=b", "model", "path:a=b"),
        ("model=path:/a/b #c", "model", "path:/a/b #c"),
        ("model=path:/x#1", "model", "path:/x#1"),
        ("model=path:/a: b", "model", "path:/a: b"),
        ("model='path:/a #b'", "model", "path:/a #b"),
        ("data.columns.input=no", "data.columns.input", "no"),
        ("data.columns.input=2024-01-01", "data.columns.input", "2024-01-01"),
        ("lora.rank=016", "lora.rank", 16),
        ("seed=+5", "seed", 5),
        ("lora.dropout=.5", "lora.dropout", 0.5),
        (
            "lora.placement={modules: [q_proj]}",
            "lora.placement",
            PlacementConfig(modules=["q_proj"]),
        ),
    ],
)
def test_set_changes_one_key(override, key, value):
    found = load_config(overrides=[override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_set_comes_after_the_file_and_the_last_one_wins(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {max_steps: 5, batch_size: 3}")
    config = load_config(path, overrides=["train.max_steps=6", "train.max_steps=7"])
    assert (config.train.max_steps, config.train.batch_size) == (7, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_steps", "--set train.max_steps: must be key=value, e.g. train.max_steps=100"),
        ("=1", "--set =1: must be key=value, e.g. train.max_steps=100"),
        ("train..x=1", "--set train..x=1: must be key=value, e.g. train.max_steps=100"),
        ("seed=[1", "--set seed:1: expected ',' or ']', but got '<stream end>'"),
        (
            "train.max_step=2",
            "base_config.yaml with --set: train.max_step: unknown key; did you mean 'max_steps'?",
        ),
        (
            "seed.x=2",
            "base_config.yaml with --set: seed: input should be a valid integer, got {'x': 2}",
        ),
    ],
)
def test_a_set_that_is_wrong_says_so(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    assert str(caught.value) == message


def test_a_placement_or_template_is_one_value_and_not_merged(tmp_path):
    first = "lora: {placement: {modules: [q_proj], layers: [1]}}"
    path = tmp_path / "mine.yaml"
    path.write_text(first)
    config = load_config(path, overrides=["lora.placement={modules: [v_proj]}"])
    assert config.lora.placement == PlacementConfig(modules=["v_proj"])
    template = "{with_input: 'Q {instruction} {input}', without_input: 'Q {instruction}'}"
    config = load_config(overrides=[f"data.template={template}"])
    assert isinstance(config.data.template, TemplateConfig)


def test_a_dumped_config_loads_as_itself(tmp_path):
    config = load_config(
        "demo", overrides=["data.max_records=40", "lora.placement={modules: [q_proj], layers: [0]}"]
    )
    text = dump_yaml(config.model_dump(mode="json"))
    assert loaded(text, tmp_path) == config
    unwritten = ("quantization", "deterministic")
    fields = [name for name in type(config).model_fields if name not in unwritten]
    assert list(yaml.safe_load(text)) == fields
    assert parse_config(config.model_dump(mode="json"), origin="x") == config


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model=path:/a: b #c", "quantization=nf4", "train.gradient_checkpointing=true"],
        ["data.columns.input=null", "data.columns.output='012'", "data.columns.instruction='0o17'"],
        ["lora.placement={modules: ['*'], ranks: {'layers:0-3': 4, q_proj: 8}}", "lora.rank=3"],
        ["data.template={with_input: '{instruction} # {input}: ', without_input: '{instruction}'}"],
        ['data.template={with_input: "{input}\\n#{instruction}", without_input: "{instruction}"}'],
    ],
)
def test_a_printed_config_is_that_config_with_every_field_described(changes, tmp_path):
    config = load_config("demo", overrides=changes)
    text = commented_yaml(config)
    assert loaded(text, tmp_path) == config
    assert yaml.safe_load(text).keys() == Config.model_fields.keys()
    for field in (Config.model_fields["seed"], type(config.train).model_fields["max_steps"]):
        assert f"  # {field.description}\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_missing_key_is_named():
    tree = BASE.model_dump()
    del tree["train"]["batch_size"]
    with pytest.raises(ConfigError, match=r"^config\.json: train\.batch_size: missing$"):
        parse_config(tree, origin="config.json")


def test_the_configs_of_a_wheel_come_first(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "only.yaml").write_text("seed: 1")
    monkeypatch.setattr(configfile, "files", lambda _: tmp_path)
    assert list(shipped_configs()) == ["only"]

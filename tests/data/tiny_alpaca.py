"""Tiny tokenizers, records, files and configs shared by the tests of ``loracle.data``."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from loracle.config.files import load_config
from loracle.config.run import ColumnsConfig, DataConfig
from loracle.data import Record

ALPACA_COLUMNS = ColumnsConfig(instruction="instruction", input="input", output="output")


def byte_tokenizer(form: str = "$A", **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few merges: any text has tokens, ``form`` puts special ones around."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["Name three primary colors. Red, blue, and yellow."], trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    special = {"eos_token": "</s>", "pad_token": "</s>", "bos_token": "<s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def alpaca_rows(count: int = 20) -> list[dict[str, str]]:
    """Rows with instructions that all differ, every other one with an input."""
    return [
        {
            "instruction": f"Name color number {index}.",
            "input": "Of the rainbow." if index % 2 else "",
            "output": f"Color {index} is as good as any other.",
        }
        for index in range(count)
    ]


def write_json(path: Path, rows: object) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def data_config(**changes: object) -> DataConfig:
    """The default ``data`` section, with changes."""
    return DataConfig.model_validate(load_config().data.model_dump() | changes)


def record(instruction: str = "Say hi.", *, context: str = "", output: str = "Hi.", row: int = 1):
    """A record; ``context`` is its input."""
    return Record(row, instruction, context, output)


def records_of(*instructions: str) -> list[Record]:
    return [record(text, row=row) for row, text in enumerate(instructions, start=1)]

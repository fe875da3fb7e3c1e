"""Alpaca records, split, tokenised and packed into rows.

Imports config, and sources for what a source and a folder of data are; torch in packing only.
"""

from loracle.data.prepare import PreparedData, prepare_data
from loracle.data.prompt import Template, template_of
from loracle.data.records import Record, read_records
from loracle.data.rows import Drop
from loracle.data.split import Split, split_records
from loracle.data.tokens import Example, encode_prompts, end_ids_of, eos_id_of

__all__ = [
    "Drop",
    "Example",
    "PreparedData",
    "Record",
    "Split",
    "Template",
    "encode_prompts",
    "end_ids_of",
    "eos_id_of",
    "prepare_data",
    "read_records",
    "split_records",
    "template_of",
]

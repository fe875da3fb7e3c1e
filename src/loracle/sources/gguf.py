"""Dequantises GGUF models into a folder that stock Transformers loads and trains."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from functools import cache
from pathlib import Path

from loracle.errors import SourceError
from loracle.records.files import plain_os_errors
from loracle.screen import quiet_transformers
from loracle.sources.gguf_keys import refused_file, unapplied_keys
from loracle.sources.gguf_tensors import apply_rope_factors, unread_tensors
from loracle.sources.gguf_tokens import apply_tokenizer, unapplied_tokenizer, unknown_tokenizer
from loracle.sources.misfits import misfits
from loracle.text import listed

_MAGIC = b"GGUF"


def convert_gguf(gguf: Path, *, folder: Path, name: str) -> None:
    """Writes ``model.safetensors``, configuration and tokenizer of a GGUF file to ``folder``.

    Weights are stored in float32. A block format stores scale x integer + minimum, which 8 bits of
    mantissa cannot represent: in SmolLM2-135M's Q4_1 file bfloat16 would change 67-76% of the
    elements of its linear layers and float16 25-33% of them (measured, CPU).

    Args:
        gguf: The file.
        folder: An existing empty folder.
        name: Names the file in messages.

    Raises:
        SourceError: Not a GGUF file, a part of one, of an architecture that Transformers cannot
            read, or with a key or tensor whose meaning would be lost.
        OSError: Full disk or no permission.
    """
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise SourceError(f"{name}: not a GGUF file")
    try:
        # Some progress bars ignore the verbosity setting.
        with quiet_transformers(), redirect_stderr(io.StringIO()), _read_once():
            _convert(gguf, folder)
    except _Refused as refused:
        raise SourceError(f"{name}: {refused}") from None
    except (SourceError, OSError):
        raise
    # A malformed header or tensor makes the readers raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{name}: cannot be converted ({reason})") from error


@contextmanager
def _read_once() -> Iterator[None]:
    """Has everyone in the block share one reader of a file, and one table of tensor names.

    Transformers opens three readers, each of which reads the whole vocabulary, and makes a table
    for each module of the model: more than half of a conversion's time.
    """
    import gguf

    read, names = gguf.GGUFReader, gguf.get_tensor_name_map
    shared = cache(read)
    gguf.GGUFReader = lambda path: shared(str(path))
    gguf.get_tensor_name_map = cache(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = read, names


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    reader = GGUFReader(gguf)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    _refuse(refused_file(fields, file_name=gguf.name))
    lost = f"what this {fields['general.architecture']} model holds is not understood: {{}}"
    _refuse(unknown_tokenizer(fields), lost)
    # Without dequantize=True the model counts as quantised and can be neither saved nor trained.
    model, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        local_files_only=True,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _refuse(misfits(model, report), "tensors and keys do not fit: {}")
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    apply_rope_factors(model.config, tensors)
    unread = unread_tensors(model, tensors, architecture=fields["general.architecture"])
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    apply_tokenizer(tokenizer, fields)
    unapplied = [
        *unapplied_keys(fields, config=model.config.get_text_config()),
        *unapplied_tokenizer(tokenizer, fields),
        *unread,
    ]
    _refuse(listed(unapplied), lost)
    with plain_os_errors():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class _Refused(Exception):
    """The file is readable, and what it holds cannot be used as it is meant."""


def _refuse(fault: str | None, phrase: str = "{}") -> None:
    if fault:
        raise _Refused(phrase.format(fault))

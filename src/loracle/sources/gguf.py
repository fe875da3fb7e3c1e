"""Dequantises GGUF models into a folder that stock Transformers loads and trains."""

from __future__ import annotations

import io
import struct
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from loracle.errors import SourceError
from loracle.quiet import quiet_transformers
from loracle.records.files import plain_os_errors

_MAGIC = b"GGUF"
# Raised by Transformers and gguf for a malformed header or tensor.
_UNREADABLE = (
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error),
    *(OverflowError, MemoryError),
)


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
        SourceError: Not a GGUF file, or of an architecture that Transformers cannot read.
        OSError: Full disk or no permission.
    """
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise SourceError(f"{name}: not a GGUF file")
    try:
        # Some progress bars ignore the verbosity setting.
        with quiet_transformers(), redirect_stderr(io.StringIO()):
            _convert(gguf, folder)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SourceError(f"{name}: cannot be converted ({reason})") from error


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without dequantize=True the model counts as quantised and can be neither saved nor trained.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        local_files_only=True,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True
    )
    _restore_pre_tokenizer(tokenizer, gguf)
    with plain_os_errors():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_pre_tokenizer(tokenizer: Any, gguf: Path) -> None:
    """Restores the text splitting of training where Transformers does not read it from GGUF.

    The pre-tokenizer ``smollm`` splits off every digit before anything else; without it, a line
    break before a number becomes other tokens. On answers with numbered lists the untuned
    SmolLM2-135M gives 0.356 nats per character with it, 0.371 without (measured).
    Source: SMOLLM in ggml-org/llama.cpp src/llama-vocab.cpp.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if field is not None and field.contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
        )

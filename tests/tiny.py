"""A tiny random Llama with a tokenizer, and Alpaca records, as folders and files."""

import json
import random
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPACA_INTRO = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n\n### Input:\n\n### Response:\n"
)
_THINGS = ("color", "river", "number", "planet", "word", "animal", "fruit", "city")
_VERBS = ("Name", "Describe", "Count", "Draw", "Explain", "Translate")
_ANSWERS = ("red", "blue", "yellow", "the Nile", "seven", "Mars", "a cat", "an apple", "Paris")


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 ids: any text has tokens, the Alpaca template only a few."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = " ".join((*_VERBS, *_THINGS, *_ANSWERS))
    backend.train_from_iterator([ALPACA_INTRO] * 4 + [words], trainer)
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny_model(
    folder: Path, *, layers: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Writes a random Llama and its tokenizer to ``folder``, as Transformers saves them."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Large enough that the model is sure of something and its attention is not uniform.
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_records(path: Path, *, count: int, seed: int) -> Path:
    """Writes Alpaca JSON: with and without inputs, every seventh instruction a repetition."""
    draw = random.Random(seed)
    rows: list[dict[str, str]] = []
    for index in range(count):
        verb, thing, answer = draw.choice(_VERBS), draw.choice(_THINGS), draw.choice(_ANSWERS)
        rows.append(
            {
                "instruction": f"{verb} {thing} {index}.",
                "input": f"The {draw.choice(_THINGS)} is {answer}." if draw.random() < 0.4 else "",
                "output": ", ".join(draw.choices(_ANSWERS, k=draw.randint(1, 5))) + ".",
            }
        )
        if index % 7 == 6:
            rows[-1]["instruction"] = rows[draw.randrange(index)]["instruction"]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path

"""Checks a saved adapter against its run's recorded loss, with stock Transformers and PEFT.

    python experiments/reload_with_stock_peft.py RUN MODEL_FOLDER

Scores the run's whole validation set again, one example at a time. Only the run's files are used,
none of LoRAcle's code.
"""

import json
import math
import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

run, model_folder = Path(sys.argv[1]), Path(sys.argv[2])
config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
dtype = json.loads((run / "environment.json").read_text(encoding="utf-8"))["device"]["dtype"]
with (run / "examples.jsonl").open(encoding="utf-8") as lines:
    examples = [row for row in map(json.loads, lines) if row["nll_sum_nats"] is not None]

# Model. The base in the run's dtype, with the run's adapter, without dropout.
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(model_folder)
in_dtype = getattr(torch, dtype)
packing = None
if config.get("quantization") == "nf4":
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=in_dtype,
    )
base = AutoModelForCausalLM.from_pretrained(
    model_folder, dtype=in_dtype, device_map={"": device}, quantization_config=packing
)
model = PeftModel.from_pretrained(base, run / "adapter").eval()

# Prompt. Stanford Alpaca's two forms (Taori et al. 2023), or those of the run's config.
ALPACA = {
    "with_input": (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    ),
    "without_input": (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
}
template = ALPACA if config["data"]["template"] == "alpaca" else config["data"]["template"]


def prompt_of(row: dict) -> str:
    before, _, after = template["with_input" if row["input"] else "without_input"].partition(
        "{instruction}"
    )
    return before + row["instruction"] + after.replace("{input}", row["input"])


# Tokens. Prompt and response are tokenised separately, so that their boundary is a count; the
# response is plain text, truncated to the run's limit, and ends with EOS.
def tokens_of(row: dict) -> tuple[list[int], list[int]]:
    prompt = tokenizer(prompt_of(row))["input_ids"]
    response = tokenizer(row["reference"], add_special_tokens=False, split_special_tokens=True)
    room = config["data"]["max_tokens"] - len(prompt) - 1
    return prompt, [*response["input_ids"][:room], tokenizer.eos_token_id]


# Loss. Nats over every response token, EOS included, divided by their number.
nll_sums, num_targets = [], 0
for row in examples:
    prompt, response = tokens_of(row)
    assert len(response) == row["tokens"], f"row {row['row']}: other tokens than the run's"
    ids = torch.tensor([prompt + response], device=device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    nll = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
    nll_sums.append(nll.double().sum().item())
    num_targets += len(response)

recorded = math.fsum(row["nll_sum_nats"] for row in examples) / num_targets
reloaded = math.fsum(nll_sums) / num_targets
print(f"{len(examples)} validation examples, {num_targets:,} tokens, {dtype}")
print(f"recorded  {recorded:.8f} nats per token, perplexity {math.exp(recorded):.4f}")
print(f"reloaded  {reloaded:.8f} nats per token, perplexity {math.exp(reloaded):.4f}")
print(f"relative difference {abs(reloaded - recorded) / recorded:.1e}")

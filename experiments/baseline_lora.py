"""The standard LoRA baseline, step by step, as in the methods section of a paper.

    python experiments/baseline_lora.py [CONFIG]        e.g. demo

``loracle baseline`` does the same and also records, resumes, measures and audits.
"""

import sys

import loracle

config = loracle.load_config(sys.argv[1] if len(sys.argv) > 1 else "base_config")

# Model. A frozen causal language model in the best dtype of the device.
device = loracle.choose_device(config.device)
dtype = loracle.choose_dtype(config.dtype, device=device)
model = loracle.resolve_model(config.model, progress=print)
base = loracle.load_base(model.path, device=device, dtype=dtype)

# Data. Alpaca records in Stanford's prompt, split 80/20 so that nothing asked is in both parts;
# the loss is over the response and its end-of-sequence token.
records = loracle.resolve_data(config.data.source, progress=print)
data = loracle.prepare_data(
    records, config=config.data, tokenizer=base.tokenizer, end_ids=base.end_ids
)

# Adapters. Rank r on every module of the placement; A from the module's random stream, B zero.
plan = loracle.resolve_placement(
    config.lora.placement,
    inventory=loracle.inventory_of(base.model),
    rank=config.lora.rank,
    alpha=config.lora.alpha,
)
adapter = loracle.attach_adapter(
    base,
    name="default",
    plan=plan,
    dropout=config.lora.dropout,
    seed=config.seed,
    model_source=model.source,
)
print(f"{plan.trainable_params:,} of {plan.base_params:,} parameters train")


# Evaluation. Token-weighted perplexity on all held-out examples.
def perplexity(name: str | None) -> float:
    scores = loracle.score_examples(
        base, data.validation, adapter=name, batch_tokens=config.eval.batch_tokens
    )
    return loracle.likelihood(scores).perplexity


print(f"perplexity of the untuned model: {perplexity(None):.3f}")

# Optimization. AdamW with warm-up and decay, one packed row of real tokens per step.
run = loracle.new_run(
    base,
    adapter=adapter,
    examples=data.train,
    train=config.train,
    dropout=config.lora.dropout,
    seed=config.seed,
)
budget = config.train.micro_batch_tokens
for (step,) in loracle.train_bundle(base, [run], micro_batch_tokens=budget):
    print(f"step {step.step}: {step.loss_nats_per_token:.4f} nats/token, {step.step_time_s:.2f} s")

print(f"perplexity of the tuned model: {perplexity(adapter.name):.3f}")

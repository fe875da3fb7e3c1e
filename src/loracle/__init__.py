"""LoRAcle: where should LoRA adapters go? A laboratory that answers with evidence."""

__version__ = "0.1.0"

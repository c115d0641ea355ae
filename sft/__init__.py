"""sft: supervised finetuning whose every trained token can be seen, and which can be killed anywhere."""

__version__ = "0.1.0"

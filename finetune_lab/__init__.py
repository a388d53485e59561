"""A course on fine-tuning language models, and the code that it teaches with."""

from finetune_lab import environment

__version__ = "0.1.0"

environment.prepare()

import pytest
from transformers import AutoTokenizer

from finetune_lab.lab.models import tiny_folder


@pytest.fixture
def tiny_tokenizer():
    """A fresh tokenizer of the tiny model for every test: tests may change it."""
    return AutoTokenizer.from_pretrained(tiny_folder())

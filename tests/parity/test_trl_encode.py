"""The rows that `finetune-lab sft` gives to the trainer are those that TRL would have prepared, token by token."""

import random

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from finetune_lab.lab.finetune.encode import encode_all
from finetune_lab.lab.templates import SMOLLM2_SHIPPED, training_template

WORDS = ["lamp", "order", "4417", "Ost", "is", "where?", '{"a": 1}', "the", "\n", "café", "£5"]


def rows(kind, count=12):
    rng = random.Random(3)
    out = []
    for _ in range(count):
        turns = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.4 else []
        for _ in range(rng.randint(1, 3)):
            turns += [{"role": r, "content": " ".join(rng.choices(WORDS, k=6))} for r in ("user", "assistant")]
        out.append({"messages": turns} if kind == "messages" else {"prompt": turns[:-1], "completion": turns[-1:]})
    return out


@pytest.mark.parametrize("template", ["own", "SmolLM2's, without marks"])
@pytest.mark.parametrize(
    ("kind", "loss", "theirs"),
    [
        ("prompt-completion", "completion", {}),
        ("prompt-completion", "all", {"completion_only_loss": False}),
        ("messages", "assistant", {"assistant_only_loss": True}),
        ("messages", "all", {}),
    ],
)
def test_our_rows_equal_trls(tiny_tokenizer, tmp_path, kind, loss, theirs, template):
    if template != "own":
        tiny_tokenizer.chat_template = SMOLLM2_SHIPPED
        tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    args = SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, activation_checkpointing=False, report_to=[], max_length=24, **theirs
    )
    data = rows(kind)
    mine = [e for e in encode_all(data, tiny_tokenizer, loss, 24) if e.counted]
    if loss == "assistant":  # TRL 1.16 refuses SmolLM2's template here, as it knows no marked copy of it
        tiny_tokenizer.chat_template = training_template(tiny_tokenizer)
    prepared = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tiny_tokenizer
    ).train_dataset
    assert [(e.ids, e.labels) for e in mine] == [(r["input_ids"], r["labels"]) for r in prepared]

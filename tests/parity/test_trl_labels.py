"""Our ids and labels against those that TRL's SFTTrainer prepares from the same data, token by token."""

import random

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

from finetune_lab.methods.chat import assistant_labels, chat_format, completion_labels, render_chat, text_encoder
from finetune_lab.methods.loss import IGNORE_INDEX, chunked_loss

WORDS = ["lamp", "order", "4417", "Ost", "is", "where?", "yes.", '{"a": 1}', "the", " ", "\n", "café", "flickers", "£5"]


def conversation(rng, turns):
    messages = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.4 else []
    for _ in range(turns):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))})
    return messages


def trainer(rows, tokenizer, tmp_path, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    args = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        shuffle_dataset=False,
        per_device_train_batch_size=4,
        max_length=None,
        **settings,
    )
    return SFTTrainer(
        model=LlamaForCausalLM(config), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def prepared(rows, tokenizer, tmp_path, **settings):
    data = trainer(rows, tokenizer, tmp_path, **settings).train_dataset
    return [(row["input_ids"], row["labels"]) for row in data]


@pytest.fixture
def ours(tiny_tokenizer):
    return chat_format(tiny_tokenizer), text_encoder(tiny_tokenizer)


def test_assistant_labels_equal_trl_assistant_only_loss(tiny_tokenizer, ours, tmp_path):
    rng = random.Random(0)
    rows = [{"messages": conversation(rng, turns=rng.randint(1, 4))} for _ in range(40)]
    expected = []
    for row in rows:
        ids, spans = render_chat(row["messages"], *ours)
        expected.append((ids, assistant_labels(ids, spans)))
    assert prepared(rows, tiny_tokenizer, tmp_path, assistant_only_loss=True) == expected


@pytest.mark.parametrize("history", [0, 2], ids=["one turn", "earlier turns in the prompt"])
def test_completion_labels_equal_trl_completion_only_loss(tiny_tokenizer, ours, tmp_path, history):
    rng = random.Random(1)
    rows = []
    for _ in range(40):
        messages = conversation(rng, turns=history + 1)
        rows.append({"prompt": messages[:-1], "completion": messages[-1:]})
    expected = []
    for row in rows:
        prompt, _ = render_chat(row["prompt"], *ours, add_generation_prompt=True)
        ids, _ = render_chat(row["prompt"] + row["completion"], *ours)
        expected.append((ids, completion_labels(prompt, ids)))
    assert prepared(rows, tiny_tokenizer, tmp_path) == expected


def test_messages_with_trls_default_settings_train_on_every_token(tiny_tokenizer, ours, tmp_path):
    rows = [{"messages": conversation(random.Random(2), turns=2)}]
    ids, labels = prepared(rows, tiny_tokenizer, tmp_path)[0]
    assert labels == ids and IGNORE_INDEX not in labels


def test_our_loss_on_our_labels_equals_the_loss_that_trl_trains_with(tiny_tokenizer, ours, tmp_path):
    rng = random.Random(3)
    rows = [{"messages": conversation(rng, turns=2)} for _ in range(4)]
    trl = trainer(rows, tiny_tokenizer, tmp_path, assistant_only_loss=True)
    batch = next(iter(trl.get_train_dataloader()))
    trl.model.eval()
    theirs = trl.compute_loss(trl.model, dict(batch))
    hidden = trl.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mine = chunked_loss(hidden, trl.model.lm_head.weight, batch["labels"])
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_items", [None, 30])
def test_chunked_loss_equals_trls_fused_head(num_items):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )
    add_fused_lm_head(model)
    ids = torch.randint(61, (3, 9))
    labels = ids.masked_fill(torch.rand(3, 9) < 0.6, IGNORE_INDEX)
    labels[:, -1] = ids[:, -1]
    theirs = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=num_items).loss
    hidden = model.model(input_ids=ids).last_hidden_state
    mine = chunked_loss(hidden, model.lm_head.weight, labels, num_items)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(mine, weights), torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

"""What `finetune-lab dpo` shows and scores is what TRL's trainers train on, token by token; so is what it leaves out."""

import random

import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finetune_lab.lab.finetune.pairs import as_rated, encode_preferences
from finetune_lab.lab.templates import SMOLLM2_SHIPPED

WORDS = ["lamp", "order", "4417", "Ost", "is", "where?", '{"a": 1}', "the", "\n", "café", "£5"]
LONGEST = 72


def rows(count=24):
    rng = random.Random(5)

    def turn(role):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))}

    out = []
    for _ in range(count):
        prompt = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.4 else []
        prompt += [turn(role) for role in ["user", "assistant"] * rng.randint(0, 1) + ["user"]]
        out.append({"prompt": prompt, "chosen": [turn("assistant")], "rejected": [turn("assistant")]})
    return out


@pytest.fixture(params=["own", "SmolLM2's"])
def tokenizer(tiny_tokenizer, request):
    if request.param != "own":
        tiny_tokenizer.chat_template = SMOLLM2_SHIPPED
        tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tiny_tokenizer


def prepared(trainer, config, data, tokenizer, folder):
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2,
        )
    )  # fmt: skip
    args = config(
        str(folder), use_cpu=True, bf16=False, activation_checkpointing=False, report_to=[], max_length=LONGEST,
        precompute_ref_log_probs=True, per_device_train_batch_size=4,
    )  # fmt: skip
    return trainer(model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer)


def whole(prompt, answer):
    """One of TRL's rows as ids and labels, cut as its collator cuts."""
    return (prompt + answer)[:LONGEST], ([-100] * len(prompt) + answer)[:LONGEST]


def test_our_pairs_equal_trls(tokenizer, tmp_path):
    data = rows()
    mine = [e for e in encode_preferences(data, tokenizer, LONGEST) if e.counted]
    theirs = prepared(DPOTrainer, DPOConfig, data, tokenizer, tmp_path).train_dataset
    assert 4 < len(mine) < len(data)  # some prompts fill max_length: TRL drops these rows, so do we
    assert [[(e.ids, e.labels) for e in (pair.chosen, pair.rejected)] for pair in mine] == [
        [whole(r["prompt_ids"], r["chosen_ids"]), whole(r["prompt_ids"], r["rejected_ids"])] for r in theirs
    ]


def test_our_rated_answers_equal_trls_in_content_and_order(tokenizer, tmp_path):
    data = as_rated(rows(), seed=1)
    mine = [(e.ids, e.labels, e.good) for e in encode_preferences(data, tokenizer, LONGEST) if e.counted]
    theirs = prepared(KTOTrainer, KTOConfig, data, tokenizer, tmp_path).train_dataset
    assert mine == [(*whole(r["prompt_ids"], r["completion_ids"]), r["label"]) for r in theirs]

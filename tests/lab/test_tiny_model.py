"""The shipped model: what it is, and that training, answering and pre-training do what they say."""

import json
import math

import pytest
import torch

from finetune_lab.errors import UserError
from finetune_lab.lab import models, pretrain, tasks, tiers, train
from finetune_lab.lab.evaluate import general, perplexity
from finetune_lab.lab.generate import answer, complete, stop_ids


@pytest.fixture(scope="module")
def tiny():
    return models.load("tiny")


def test_no_linear_layer_is_square_and_all_fit_nf4_blocks(tiny):
    for name, module in tiny[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features != module.out_features, name
            assert module.in_features % 64 == 0 and module.out_features % 32 == 0, name


def test_pad_end_of_turn_and_end_of_text_are_three_tokens(tiny):
    tokenizer = tiny[1]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, end}) == 4
    assert stop_ids(tokenizer) == sorted({end, tokenizer.eos_token_id})


def test_any_text_survives_the_tokenizer_and_every_digit_is_one_token(tiny):
    tokenizer = tiny[1]
    for text in ("order 4821!", "微调 ümläut 🎈\n\ttab", '{"a": "b"}  x'):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize("4821") == list("4821")


def test_the_chat_template_marks_what_the_assistant_said(tiny):
    tokenizer = tiny[1]
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "oak"}]
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    said = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(said) == "oak<|end|>"


def test_the_base_knows_its_world(tiny):
    known = general(*tiny, n=60)
    assert known["facts"] >= 0.9 and known["sums"] >= 0.9


def test_an_answer_does_not_depend_on_its_batch(tiny):
    prompts = [item["prompt"] for item in tasks.load_task("extract", "test", 6)]
    alone = [answer(*tiny, [p], max_new_tokens=12)[0] for p in prompts]
    assert answer(*tiny, prompts, max_new_tokens=12) == alone


def test_generation_leaves_the_mode_of_the_model_alone(tiny):
    model, tokenizer = tiny
    for mode in (True, False):
        model.train(mode)
        complete(model, tokenizer, [[1, 5, 6]], max_new_tokens=2)
        assert model.training is mode
    model.eval()


def test_perplexity_is_the_exponent_of_transformers_loss(tiny):
    model, tokenizer = tiny
    ids = torch.tensor(
        [[tokenizer.bos_token_id, *tokenizer.encode("The flag of Veldale is red.", add_special_tokens=False)]]
    )
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert perplexity(model, tokenizer, ["The flag of Veldale is red."]) == pytest.approx(math.exp(loss), rel=1e-5)


@pytest.mark.parametrize("rank", [None, 4])
def test_a_few_steps_of_sft_lower_the_loss_and_repeat_exactly(rank):
    def run() -> list[float]:
        model, tokenizer = models.load("tiny")
        model = train.add_lora(model, rank) if rank else model
        items = tasks.load_task("answer", "train", 32)
        history = train.sft(model, tokenizer, items, steps=8, batch_size=8, lr=2e-3 if rank else 5e-4, warmup=2)
        return [row["loss"] for row in history]

    first = run()
    assert sum(first[-2:]) < sum(first[:2])
    assert first == run()


def test_every_item_is_seen_once_before_any_comes_again():
    chosen = [i for batch in train.batches(10, 4, 5, seed=0) for i in batch]
    assert sorted(chosen[:10]) == list(range(10)) == sorted(chosen[10:20])


def test_the_completion_mask_counts_the_answer_and_its_end_only(tiny):
    tokenizer = tiny[1]
    items = tasks.load_task("answer", "train", 5)
    for (ids, labels), item in zip(train.encode(tokenizer, items), items, strict=True):
        assert tokenizer.decode([x for x in labels if x != -100]) == tasks.reference(item) + "<|end|>"
        assert len(ids) == len(labels)
    with pytest.raises(UserError, match="unknown mask 'prompt'"):
        train.encode(tokenizer, items, mask="prompt")


def test_an_item_longer_than_the_context_is_refused_with_its_number(tiny):
    item = {
        "prompt": [{"role": "user", "content": "lamp " * 400}],
        "completion": [{"role": "assistant", "content": "x"}],
    }
    with pytest.raises(UserError, match="item 0 has 4.. tokens"):
        train.encode(tiny[1], [item])


def test_a_killed_pre_training_goes_on_as_if_nothing_had_happened(tmp_path):
    pretrain.pretrain(tmp_path / "whole", steps=4, every=2)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(tmp_path / "killed", steps=4, every=2, on_save=_stop_at_two)
    pretrain.pretrain(tmp_path / "killed", steps=4, every=2)
    whole, killed = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "killed"))
    assert whole == killed


def _stop_at_two(step: int) -> None:
    if step == 2:
        raise KeyboardInterrupt


def test_the_shipped_model_carries_the_record_of_its_making(tiny):
    made = json.loads((models.tiny_folder() / "pretrain.json").read_text())
    assert made["steps"] == pretrain.STEPS and made["seed"] == pretrain.SEED
    assert made["tokens"] == made["steps"] * pretrain.BATCH * 256
    assert made["parameters"] == tiny[0].num_parameters()


def test_tiers_follow_the_name_of_the_model(monkeypatch):
    assert tiers.tier("tiny") is tiers.TINY and tiers.tier("some/hub-id") is tiers.LARGE
    monkeypatch.setenv("FINETUNE_LAB_MODEL", "smollm2-135m")
    assert tiers.tier() is tiers.SMALL
    plain = tasks.load_task("extract", "test", 2)
    told = tiers.SMALL.items("extract", "test", 2)
    assert told[0]["prompt"][0]["content"] == tiers.SMALL.instruction["extract"] + plain[0]["prompt"][0]["content"]
    assert tiers.TINY.items("extract", "test", 2) == plain

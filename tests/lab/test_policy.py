"""Samples and KL: repeatable, and equal to what can be enumerated."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.errors import UserError
from finetune_lab.lab import models, policy
from finetune_lab.lab.generate import stop_ids
from finetune_lab.lab.train import add_lora

TOKENIZER = models.load_tokenizer("tiny")
PROMPTS = ["Where is order 4417?", "hi"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def moved(model, by=0.05):
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += by * torch.randn_like(parameter)
    return other


def test_the_same_seed_gives_the_same_texts_and_another_seed_others(model):
    texts = [policy.sample(model, TOKENIZER, PROMPTS, n=3, max_new_tokens=8, seed=seed) for seed in (0, 0, 1)]
    assert [len(each) for each in texts[0]] == [3, 3]
    assert texts[0] == texts[1] != texts[2]


def test_nothing_is_cut_off_the_distribution(model):
    """transformers samples from the 50 likeliest tokens unless told otherwise; a random model then shows 50, not 1,792."""
    _, answers = policy.sample_ids(model, TOKENIZER, ["hi"], n=300, max_new_tokens=1)
    assert len({answer[0] for answer in answers}) > 150


def test_an_answer_ends_with_its_stop_token_and_nothing_follows(model):
    with torch.no_grad():
        stop = stop_ids(TOKENIZER)[0]
        model.lm_head.weight[stop] += 3 * model.model(torch.tensor([[5, 6]]))[0].mean((0, 1))
    _, answers = policy.sample_ids(model, TOKENIZER, ["hi"], n=50, max_new_tokens=12)
    stops = stop_ids(TOKENIZER)
    ended = [answer for answer in answers if answer[-1] in stops]
    assert ended and all(token not in stops for answer in answers for token in answer[:-1])


def test_kl_to_itself_is_zero_and_to_another_model_is_not(model):
    assert policy.kl_to_reference(model, model, TOKENIZER, PROMPTS, max_new_tokens=4)["kl"] == 0
    assert policy.kl_to_reference(model, moved(model), TOKENIZER, PROMPTS, max_new_tokens=4)["kl"] > 0.01


def test_kl_of_answers_of_one_token_is_the_enumerated_one(model):
    other = moved(model)
    heads, _ = policy.sample_ids(model, TOKENIZER, PROMPTS, max_new_tokens=1)
    wanted = []
    for head in heads:
        p, q = (m(torch.tensor([head])).logits[0, -1].log_softmax(-1) for m in (model, other))
        wanted.append((p.exp() * (p - q)).sum().item())
    found = policy.kl_to_reference(model, other, TOKENIZER, PROMPTS, max_new_tokens=1)
    assert found["kl"] == pytest.approx(sum(wanted) / 2, rel=1e-4) and found["n"] == 2


def test_kl_agrees_with_the_mean_log_ratio_of_the_samples_and_has_less_noise(model):
    other = moved(model)
    found = policy.kl_to_reference(model, other, TOKENIZER, ["hi"], n=200, max_new_tokens=4)
    heads, answers = policy.sample_ids(model, TOKENIZER, ["hi"], n=200, max_new_tokens=4)
    ratios = []
    for head, answer in zip(heads, answers, strict=True):
        ids, places = torch.tensor([head + answer]), range(len(head) - 1, len(head) + len(answer) - 1)
        p, q = (m(ids).logits[0].log_softmax(-1) for m in (model, other))
        ratios.append(sum((p[t, ids[0, t + 1]] - q[t, ids[0, t + 1]]).item() for t in places))
    ratios = torch.tensor(ratios)
    noise = ratios.std().item() / len(ratios) ** 0.5
    assert found["kl"] == pytest.approx(ratios.mean().item(), abs=4 * noise)
    assert found["standard_error"] < noise / 2


def test_an_adapter_off_is_a_reference(model):
    adapted = add_lora(copy.deepcopy(model), 4)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.3
    wanted = policy.kl_to_reference(adapted, model, TOKENIZER, PROMPTS, max_new_tokens=3)
    assert policy.kl_to_reference(adapted, "adapter off", TOKENIZER, PROMPTS, max_new_tokens=3) == pytest.approx(wanted)
    with pytest.raises(UserError, match="needs a peft model"):
        policy.kl_to_reference(model, "adapter off", TOKENIZER, PROMPTS)

"""Pairs and thumbs as token rows; log-probabilities of them, one row a pair or two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.lab import models, pairs, tasks
from finetune_lab.methods.preference import sequence_logps

TOKENIZER = models.load_tokenizer("tiny")
ROWS = pairs.as_pairs(tasks.load_task("reply", "train", 6))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_both_answers_of_a_pair_stand_behind_the_same_prompt():
    for (chosen, labels), (rejected, _) in pairs.encode_pairs(TOKENIZER, ROWS):
        start = pairs.start_of((chosen, labels))
        assert chosen[:start] == rejected[:start] and start > 5


def test_the_prompt_gives_no_term_unless_it_is_asked_for(model):
    answer_only = pairs.pair_logps(model, pairs.encode_pairs(TOKENIZER, ROWS))
    with_prompt = pairs.pair_logps(model, pairs.encode_pairs(TOKENIZER, ROWS, mask="all"))
    difference = answer_only - with_prompt  # minus the prompt's log-probability, the same for both answers
    assert (difference > 1).all()
    torch.testing.assert_close(difference[0], difference[1], rtol=0, atol=1e-3)


def test_pair_logps_are_the_plain_ones_from_full_logits(model):
    encoded = pairs.encode_pairs(TOKENIZER, ROWS)
    for side in (0, 1):
        for n, pair in enumerate(encoded):
            ids, labels = (torch.tensor([values]) for values in pair[side])
            plain = sequence_logps(model(ids).logits, labels)
            torch.testing.assert_close(pairs.pair_logps(model, encoded)[side, n], plain[0], rtol=1e-5, atol=1e-4)


@given(
    prompts=st.lists(st.integers(1, 9), min_size=1, max_size=3), lengths=st.lists(st.integers(1, 7), min_size=6, max_size=6)
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_one_row_a_pair_gives_the_log_probabilities_of_two(model, prompts, lengths):
    def row(seed, start, length):
        g = torch.Generator().manual_seed(seed)
        head = torch.randint(5, 900, (start,), generator=torch.Generator().manual_seed(start)).tolist()
        answer = torch.randint(5, 900, (length,), generator=g).tolist()
        return head + answer, [-100] * start + answer

    encoded = [(row(2 * i, start, lengths[2 * i]), row(2 * i + 1, start, lengths[2 * i + 1]))
               for i, start in enumerate(prompts)]  # fmt: skip
    two, one = pairs.pair_logps(model, encoded), pairs.shared_pair_logps(model, encoded)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-4)


def test_one_row_a_pair_gives_the_gradients_of_two(model):
    encoded = pairs.encode_pairs(TOKENIZER, ROWS[:3])
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scale = torch.tensor([[1.0, -0.5, 2.0], [-1.0, 0.3, 0.7]])
    both = [
        torch.autograd.grad((scale * logps(model, encoded)).sum(), weights)
        for logps in (pairs.pair_logps, pairs.shared_pair_logps)
    ]
    largest = max(grad.abs().max() for grad in both[0])
    assert max((a - b).abs().max() / largest for a, b in zip(*both, strict=True)) <= 1e-5


def test_one_row_a_pair_also_counts_the_prompt_when_it_is_labelled(model):
    encoded = pairs.encode_pairs(TOKENIZER, ROWS[:2], mask="all")
    torch.testing.assert_close(
        pairs.shared_pair_logps(model, encoded), pairs.pair_logps(model, encoded), rtol=1e-5, atol=1e-3
    )


def test_thumbs_are_the_pairs_taken_apart():
    thumbs = pairs.as_thumbs(ROWS)
    assert [row["label"] for row in thumbs] == [True] * 6 + [False] * 6
    assert thumbs[0]["completion"] == ROWS[0]["chosen"] and thumbs[6]["completion"] == ROWS[0]["rejected"]


def test_each_prompt_meets_the_answer_of_the_row_before_it():
    rows = [([1, 2, 10], [-100, -100, 10]), ([3, 20, 21], [-100, 20, 21]), ([4, 5, 30], [-100, -100, 30])]
    mismatched = pairs.with_mismatched(rows)[3:]
    assert [ids for ids, _ in mismatched] == [[1, 2, 30], [3, 10], [4, 5, 20, 21]]
    assert mismatched[2][1] == [-100, -100, 20, 21]


def test_frozen_log_probabilities_do_not_depend_on_the_batch(model):
    encoded = pairs.encode_pairs(TOKENIZER, ROWS)
    whole = pairs.frozen_logps(model, encoded)
    assert not whole.requires_grad
    torch.testing.assert_close(pairs.frozen_logps(model, encoded, batch_size=2), whole, rtol=1e-5, atol=1e-4)

"""Each silent failure is found where it is, and not found where it is not."""

import pytest
from transformers import AutoTokenizer

from finetune_lab.lab.finetune import silent
from finetune_lab.lab.finetune.encode import Example, encode_all, preview, turn_end
from finetune_lab.lab.models import tiny_folder
from finetune_lab.lab.templates import SMOLLM2_MARKED, SMOLLM2_SHIPPED

ROW = {
    "prompt": [{"role": "user", "content": "Where is my lamp?"}],
    "completion": [{"role": "assistant", "content": "On its way."}],
}
TALK = {"messages": ROW["prompt"] + ROW["completion"] + [{"role": "user", "content": "Thanks"}] + ROW["completion"]}
END = 9


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


@pytest.fixture
def chatml():
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder())
    tokenizer.chat_template = SMOLLM2_SHIPPED
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    return tokenizer


def example(labels, ids=None):
    return Example(ids or [5] * len(labels), labels)


def test_rows_without_a_labelled_token_are_named():
    good, empty = example([-100, 5, END]), example([-100, -100])
    assert silent.no_labelled_token([good, good]) is None
    found = silent.no_labelled_token([good, empty, empty])
    assert found.level == "warning" and "2 of 3" in found.found and "rows 2, 3" in found.found


def test_the_first_token_is_never_predicted_so_it_does_not_count():
    assert silent.no_labelled_token([example([5, -100])]) is not None


def test_data_where_nothing_counts_is_an_error():
    assert silent.no_labelled_token([example([-100, -100])]).level == "error"


def test_an_end_of_turn_that_never_counts_is_found():
    assert silent.end_of_turn_not_in_loss([example([-100, 5, END])], END) is None
    assert silent.end_of_turn_not_in_loss([example([-100, 5, -100])], END) is not None


def test_a_template_that_closes_its_mark_before_the_end_of_turn_is_found(chatml):
    wrong = SMOLLM2_MARKED.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
    )
    assert wrong != SMOLLM2_MARKED
    for template, finds in ((SMOLLM2_MARKED, False), (wrong, True)):
        chatml.chat_template = template
        found = silent.end_of_turn_not_in_loss(encode_all([TALK], chatml, "assistant", 256), turn_end(chatml))
        assert (found is not None) == finds


def test_an_answer_cut_off_is_found_with_the_tokens_it_loses(tokenizer):
    whole = encode_all([ROW], tokenizer, "completion", 256)
    assert silent.answer_cut_off(whole, 256) is None
    short = len(whole[0].ids) - 2
    found = silent.answer_cut_off(encode_all([ROW], tokenizer, "completion", short), short)
    assert "1 of 1" in found.found and "2 labelled tokens" in found.found


def test_the_tokens_that_cut_answers_lose_leave_out_the_rows_that_keep_none(tokenizer):
    long = {**ROW, "prompt": [{"role": "user", "content": ROW["prompt"][0]["content"] * 9}]}
    short = len(encode_all([ROW], tokenizer, "completion", 256)[0].ids) - 2
    found = silent.answer_cut_off(encode_all([ROW, long], tokenizer, "completion", short), short)
    assert "1 of 2" in found.found and "2 labelled tokens" in found.found


def test_the_size_of_a_model_is_told_in_words():
    assert "on 8 billion parameters" in silent.rate_out_of_range("full", 2e-4, 8_000_000_000).found
    assert "on 135 million parameters" in silent.rate_out_of_range("lora", 1.0, 135_000_000).found


def test_pad_that_ends_a_text_is_found(tokenizer, chatml):
    assert silent.pad_is_eos(tokenizer, turn_end(tokenizer)) is None
    assert silent.pad_is_eos(chatml, turn_end(chatml)).level == "note"


def test_with_pad_equal_to_eos_every_end_of_turn_still_counts(chatml):
    (row,) = encode_all([ROW], chatml, "completion", 256)
    assert chatml.pad_token_id in row.labels


def test_a_template_without_marks_is_found_only_where_marks_are_needed(tokenizer, chatml):
    assert silent.no_generation_marks(chatml, "assistant") is not None
    assert silent.no_generation_marks(chatml, "completion") is None
    assert silent.no_generation_marks(tokenizer, "assistant") is None


def test_two_begins_of_text_are_found(tokenizer):
    one = encode_all([ROW], tokenizer, "completion", 256)
    assert silent.double_bos(one, tokenizer.bos_token_id) is None
    tokenizer_twice = AutoTokenizer.from_pretrained(tiny_folder())
    tokenizer_twice.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    two = encode_all([ROW], tokenizer_twice, "completion", 256)
    assert "1 of 1" in silent.double_bos(two, tokenizer.bos_token_id).found


@pytest.mark.parametrize(
    ("method", "lr", "parameters", "word"),
    [
        ("lora", 2e-5, 8e9, "low"),  # full fine-tuning's rate
        ("qlora", 2e-5, 8e9, "low"),
        ("full", 2e-4, 8e9, "high"),  # LoRA's rate
        ("full", 1e-3, 135e6, "high"),
        ("lora", 2e-4, 8e9, None),
        ("full", 1e-5, 8e9, None),
        ("lora", 2e-3, 2.6e6, None),
        ("full", 5e-4, 2.6e6, None),
    ],
)
def test_a_rate_made_for_another_method_is_found(method, lr, parameters, word):
    found = silent.rate_out_of_range(method, lr, parameters)
    assert (found is None) if word is None else word in found.found


@pytest.mark.parametrize(
    ("warmup", "steps", "finds"), [(0.1, 5, False), (10, 100, False), (100, 188, True), (0.6, 9, True)]
)
def test_a_warmup_that_fills_the_run_is_found(warmup, steps, finds):
    assert (silent.warmup_too_long(warmup, steps) is not None) == finds


def test_prompts_in_training_and_validation_are_counted():
    assert silent.same_in_both(["a", "b"], ["c"]) is None
    assert "1 of 2" in silent.same_in_both(["a", "b"], ["b", "c"]).found


def test_fsdp_on_a_cpu_is_said_to_be_ddp():
    asked = {"ACCELERATE_USE_FSDP": "true"}
    assert "DDP" in silent.fsdp_without_gpu(False, asked).found
    assert silent.fsdp_without_gpu(True, asked) is None
    assert silent.fsdp_without_gpu(False, {}) is None


def test_the_preview_marks_exactly_what_counts(tokenizer):
    (row,) = encode_all([ROW], tokenizer, "completion", 256)
    assert preview(row, tokenizer) == "<|bos|><|user|>Where is my lamp?<|end|><|assistant|>[[On its way.<|end|>]]"
    (talk,) = encode_all([TALK], tokenizer, "assistant", 256)
    assert preview(talk, tokenizer).count("[[On its way.<|end|>]]") == 2

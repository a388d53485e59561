"""Claims about the choice of a method: it follows from sizes, every leaf can be reached, each points to its evidence."""

import itertools
import re

import pytest

from finetune_lab.course import decision, topics
from finetune_lab.course.decision import PREFER, TRAIN, Situation, bill, choose, explain, picture
from finetune_lab.methods import counts


def method(*args, **settings):
    return choose(Situation(*args, **settings))[0].name


def test_eighty_gigabytes_do_not_train_eight_billion_parameters_in_full():
    assert method(8, 80, far_and_much=True) == "LoRA"
    assert method(3, 80, far_and_much=True) == "Full fine-tuning"


def test_full_fine_tuning_needs_a_reason_and_not_only_room():
    assert method(0.135, 80) == "LoRA"


def test_sixteen_gigabytes_hold_no_seven_billion_parameters_in_sixteen_bits():
    assert method(7, 16, vocabulary=32_000) == "QLoRA"


def test_qlora_fits_what_its_paper_says():
    """33B on 24 GB and 65B on 48 GB, but not 65B on 24 GB (abstract and table 6)."""
    assert method(33, 24, tokens=512, vocabulary=32_000) == "QLoRA"
    assert method(65, 48, tokens=512, vocabulary=32_000) == "QLoRA"
    assert method(65, 24, tokens=512, vocabulary=32_000) == "Smaller model or more cards"


def test_seventy_billion_on_two_cards_of_24_gigabytes_in_four_bits():
    assert method(70, 24, devices=2, tokens=512, vocabulary=32_000) == "QLoRA"


SHAPES = {  # billions: hidden, intermediate, key/value width, layers, all parameters in embedding and output layer
    1.236: (2048, 8192, 512, 16),
    8.03: (4096, 14336, 1024, 32),
    70.55: (8192, 28672, 1024, 80),
}


@pytest.mark.parametrize("billions", SHAPES)
def test_the_bill_is_near_the_exact_count_of_a_llama(billions):
    hidden, intermediate, kv, layers = SHAPES[billions]
    adapter = 16 * counts.lora_parameters_all_linear(hidden, intermediate, kv, layers, 16) / 1e9
    rest = 128_256 * hidden * (1 if billions < 2 else 2) / 1e9  # the small one ties its output layer
    quantised = counts.quantised_model_bytes(1e9 * (billions - rest), 1e9 * rest, 2) / 1e9
    estimate = bill(Situation(billions, tokens=0))
    assert estimate["LoRA"] == pytest.approx(2 * billions + adapter, rel=0.03)
    assert estimate["QLoRA"] == pytest.approx(quantised + adapter, rel=0.06)
    assert estimate["full"] == 16 * billions
    tokens = 4096
    kept = counts.layer_input_bytes(1, tokens, hidden, layers) + 34 * tokens * hidden
    kept += 2 * counts.logits_bytes(1, tokens, 128_256, 4)
    assert bill(Situation(billions, tokens=tokens))["full"] - 16 * billions == pytest.approx(kept / 1e9, rel=0.1)


def test_more_cards_and_fewer_tokens_never_need_more():
    for size in (1, 8, 70):
        for name, need in bill(Situation(size)).items():
            assert bill(Situation(size, devices=4))[name] < need
            assert bill(Situation(size, tokens=512))[name] < need


def test_every_leaf_can_be_reached_and_points_to_its_evidence():
    reached = {
        leaf
        for size, memory, prompt, far, feedback in itertools.product(
            (1, 8, 70), (8, 24, 80), (False, True), (False, True), decision.FEEDBACK.values()
        )
        for leaf in choose(Situation(size, memory, prompt_is_enough=prompt, far_and_much=far, feedback=feedback))
    }
    leaves = {rung.yes for ladder in (TRAIN, PREFER) for rung in ladder.rungs} | {TRAIN.otherwise, PREFER.otherwise}
    assert reached == leaves
    known = {topic.id: topic for topic in topics.load()}
    for leaf in leaves:
        topic = known[leaf.topic]
        assert leaf.evidence.startswith(f"{topic.lesson} {topic.title}")
        assert leaf.evidence.endswith(topic.section if topic.status == "written" else f"({topic.status})")


def test_nothing_follows_when_no_fine_tuning_is_needed():
    now = Situation(prompt_is_enough=True, feedback="pairs")
    assert [leaf.name for leaf in choose(now)] == ["No fine-tuning"]
    assert "What follows SFT?" not in explain(now)


def test_the_words_give_reasons_with_numbers_and_the_lesson():
    said = explain(Situation(8, 24, feedback="pairs"))
    assert re.search(r"yes  Do 2 bytes a parameter.*LoRA needs about 19\.\d GB a card, 22\.1 GB are usable", said)
    assert "-> LoRA. Lesson 03" in said and "-> DPO or IPO. Lesson 06" in said


def thick(figure):
    """Texts of the boxes that are drawn as taken."""
    found = []
    for ax in figure.axes:
        boxes = [patch for patch in ax.patches if hasattr(patch, "get_boxstyle")]
        texts = [text for text in ax.texts if text.get_fontsize() == 8.5]
        assert len(boxes) == len(texts) == 9
        found += [text.get_text() for box, text in zip(boxes, texts, strict=True) if box.get_linewidth() > 1]
    return found


def test_the_picture_shows_every_box_and_a_situation_shows_its_path():
    assert len(thick(picture())) == 18
    taken = thick(picture(Situation(8, 16, feedback="labels")))
    assert [name for name in ("LoRA", "QLoRA", "KTO", "GRPO") if any(t.startswith(name + "\n") for t in taken)] == [
        "QLoRA",
        "KTO",
    ]
    assert len(taken) == 5 + 5


def test_the_chooser_redraws_and_carries_a_still_with_alternative_text():
    chooser = decision.chooser()
    data, metadata = chooser._repr_mimebundle_()
    assert {"image/png", "text/html", "application/vnd.jupyter.widget-view+json"} <= set(data)
    assert "-> LoRA" in metadata["image/png"]["alt"]
    before = chooser._status.value
    chooser._controls["size"].value = 70
    assert chooser._status.value != before and "Smaller model or more cards" in chooser._status.value
    assert len(data["image/png"]) + len(data["text/html"]) < 300_000 / 2  # of what a notebook may hold

import sys

import lesson_fixture as fixture
import pytest
import torch

from finetune_lab.course import check, checks, progress
from finetune_lab.course.compare import describe, difference
from finetune_lab.methods.chat import ChatFormat

pytestmark = pytest.mark.usefixtures("registry")


def mine(ids, start):
    """A right answer that is not the reference."""
    return torch.where(torch.arange(ids.shape[1]) < start, -100, ids)


def verdict(name, answer, seed=0):
    return checks.judge(checks.REGISTRY[name], answer, seed)


@pytest.mark.parametrize("name", ["hide_prompt", "Scale", "adam_bytes"])
def test_reference_passes_and_each_mistake_gets_its_own_hint(name, registry):
    ex = registry[name]
    for seed in range(5):
        assert verdict(name, ex.reference, seed).status == "ok"
        for wrong in ex.wrong:
            assert verdict(name, wrong.answer, seed).text == wrong.hint


def test_a_right_answer_comes_back_and_is_recorded(capsys):
    assert check.hide_prompt(mine) is mine
    assert capsys.readouterr().out == "[ok] 99.1 hide the prompt: 4/4 cases\n"
    assert progress.load()["exercises"]["99.1"]["ok"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda ids, start: None,
        lambda ids: ids,
        lambda ids, start: 1 / 0,
        lambda ids, start: sys.exit(),
        lambda ids, start: ids.tolist(),
        lambda ids, start: ids.float(),
        lambda ids, start: ids[0],
        lambda ids, start: type("Odd", (), {"__eq__": None, "__repr__": lambda self: 1 / 0})(),
        "hide_prompt",
        None,
        3,
        fixture.Scale,
    ],
)
def test_nothing_a_learner_passes_breaks_the_lesson(answer, capsys):
    assert check.hide_prompt(answer) is fixture.hide_prompt
    out = capsys.readouterr().out
    assert out.startswith("[x] 99.1") and "Traceback" not in out
    assert progress.load()["exercises"]["99.1"]["last"] == "wrong"


def test_the_stub_is_not_attempted_but_torchs_own_not_implemented_is_a_mistake(capsys):
    def stub(ids, start):
        raise NotImplementedError

    def torch_cannot(ids, start):
        raise NotImplementedError("Could not run 'aten::x' on the CPU")

    assert check.hide_prompt(stub) is fixture.hide_prompt
    assert capsys.readouterr().out == "[ ] 99.1 not attempted: continuing with the reference\n"
    assert verdict("hide_prompt", torch_cannot).status == "wrong"
    assert check.adam_bytes(...) == 8


def test_running_the_check_again_after_a_mistake_does_not_praise_the_reference(capsys):
    answer = check.hide_prompt(fixture.zero)
    assert check.hide_prompt(answer) is fixture.hide_prompt
    assert capsys.readouterr().out.splitlines()[1].startswith("[ ] 99.1 not attempted: this is the reference")
    assert not progress.load()["exercises"]["99.1"]["ok"]


def test_changing_the_input_is_named_when_the_values_are_right(registry):
    registry["hide_prompt"].wrong.clear()

    def spoils(ids, start):
        labels = ids.clone()
        labels[:, :start] = -100
        ids.fill_(0)
        return labels

    assert verdict("hide_prompt", spoils).text == checks.IN_PLACE


def test_the_first_difference_the_inputs_and_the_seed_are_shown():
    text = verdict("hide_prompt", lambda ids, start: ids + start, seed=7).text
    assert "expected -100, got" in text and "ids = int64 (" in text and "start = " in text and "seed=7" in text
    assert verdict("hide_prompt", lambda ids, start: ids + start, seed=7).text == text


def test_a_forgotten_return_is_named():
    assert "is a `return` missing?" in verdict("hide_prompt", lambda ids, start: None).text


def test_an_interrupt_passes_through():
    def endless(ids, start):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check.hide_prompt(endless)


@pytest.mark.parametrize(
    "mode, answer, raises",
    [
        ("solved", mine, False),
        ("solved", fixture.zero, True),
        ("unsolved", mine, True),
        ("unsolved", fixture.zero, True),
        ("learn", fixture.zero, False),
    ],
)
def test_modes(mode, answer, raises, monkeypatch):
    monkeypatch.setenv("FINETUNE_LAB_CHECK", mode)
    if raises:
        with pytest.raises(checks.CheckError):
            check.hide_prompt(answer)
    else:
        check.hide_prompt(answer)
    assert progress.path().exists() == (mode == "learn")


def test_a_progress_folder_that_cannot_be_written_does_not_stop_the_lesson(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINETUNE_LAB_HOME", str(tmp_path / "file"))
    assert check.hide_prompt(mine) is mine
    assert "not recorded" in capsys.readouterr().out


def test_checks_leave_the_notebooks_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check.hide_prompt(lambda ids, start: ids + torch.randint(0, 9, ids.shape))
    assert torch.equal(before, torch.get_rng_state())


def test_an_expected_error_may_have_the_learners_own_words():
    def reference(x):
        raise ValueError("the course's sentence")

    def mine(x):
        raise ValueError("my sentence")

    ex = checks.exercise("99.4", "refuse", reference, lambda draw: [checks.case(1)], wrong=[])
    assert checks.judge(ex, mine, 0).status == "ok"
    assert "expected a ValueError" in checks.judge(ex, lambda x: x, 0).text


def test_a_diagnosis_is_asked_when_no_known_mistake_fits():
    ex = checks.exercise(
        "99.5",
        "twice",
        lambda x: 2 * x,
        lambda draw: [checks.case(draw.normal(2, 3))],
        wrong=[],
        name="twice",
        diagnose=lambda case, expected, got: "too big" if (got / expected > 1).all() else None,
    )
    assert checks.judge(ex, lambda x: 9 * x, 0).text == "too big"
    assert "values differ" in checks.judge(ex, lambda x: -x, 0).text


def test_an_unknown_exercise_names_the_nearest():
    with pytest.raises(AttributeError, match="hide_prompt"):
        check.hide_promt  # noqa: B018


def test_sizes_are_never_square():
    assert all(a != b for a, b in checks.Draw(0).sizes(200, 1, 4))


@pytest.mark.parametrize(
    "expected, got, says",
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "shape"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "dtype"),
        (torch.zeros(2), torch.tensor([0.0, 1e-3]), "1 of 2 values differ, first at [1]"),
        (torch.tensor([float("nan")]), torch.tensor([0.0]), "differ"),
        (3, 4, "expected 3"),
        (3, True, "number"),
        (0.5, torch.tensor(0.5), ".item()"),
        ("a", "b", "'a'"),
        ([1, 2], [1], "elements"),
        ({"a": 1}, {"b": 1}, "keys"),
        ({"a": [1, 2]}, {"a": [1, 3]}, "['a'][1]"),
        (None, 0, "None"),
        (True, 1, "True"),
    ],
)
def test_differences_are_found_and_said(expected, got, says):
    assert says in difference(expected, got)
    assert difference(expected, expected) is None


def test_close_values_are_the_same_and_a_list_may_stand_for_a_tuple():
    assert difference(torch.ones(3), torch.ones(3) * (1 + 1e-7)) is None
    assert difference(torch.ones(3), torch.ones(3) * 1.01, rtol=0.1) is None
    assert difference(torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool), rtol=0.1) is None
    assert difference((1, 2.0), [1, 2]) is None
    assert difference(float("nan"), float("nan")) is None


def test_answers_that_draw_random_numbers_are_compared_under_one_seed():
    def noise(x):
        return x + torch.randn(x.shape)

    ex = checks.exercise("99.6", "noise", noise, lambda draw: [checks.case(draw.normal(2, 3))], wrong=[])
    assert checks.judge(ex, lambda x: torch.randn(x.shape) + x, 0).status == "ok"


def test_another_error_of_the_same_type_does_not_get_the_hint_of_a_known_one():
    def known(x):
        raise KeyError("labels")

    def other(x):
        raise KeyError("input_ids")

    wrong = [checks.Wrong(known, "the key is called labels")]
    ex = checks.exercise("99.7", "twice", lambda x: x, lambda draw: [checks.case(1)], wrong=wrong, name="same")
    assert checks.judge(ex, known, 0).text == "the key is called labels"
    assert "raised KeyError: 'input_ids'" in checks.judge(ex, other, 0).text


def doubled(x):
    if x == 0:
        raise ValueError("the course's sentence")
    return 2 * x


def guarded(x):
    return x if x else doubled(x)


def refuses_in_its_own_words(x):
    if x == 0:
        raise ValueError("my sentence")
    return x


def crashes_instead(x):
    return x / x * x if x else [][x]


@pytest.mark.parametrize("answer", [refuses_in_its_own_words, crashes_instead])
def test_own_words_of_an_error_or_a_crash_elsewhere_do_not_hide_a_known_mistake(answer):
    wrong = [checks.Wrong(guarded, "twice is missing"), checks.Wrong(lambda x: 3 * doubled(x), "three times too much")]
    ex = checks.exercise("99.8", "twice", doubled, lambda draw: map(checks.case, (1, 2, 0)), wrong=wrong)
    assert checks.judge(ex, answer, 0).text == "twice is missing"


def test_a_crash_that_leaves_two_known_mistakes_possible_gets_the_hint_of_neither():
    wrong = [checks.Wrong(lambda x: x + 1, "plus one"), checks.Wrong(lambda x: x + x**0, "plus a power")]
    ex = checks.exercise("99.9", "twice", doubled, lambda draw: map(checks.case, (3, 0)), wrong=wrong)
    assert "expected 6, got 4" in checks.judge(ex, lambda x: x + 1 if x else [][x], 0).text


def test_every_field_of_a_dataclass_is_shown():
    fmt = ChatFormat((164,), (164, 136), {role: (127, 101) for role in ("system", "user", "assistant")}, (188,), (103,))
    assert describe(fmt) == repr(fmt)
    long = ChatFormat((1,) * 40, tuple(range(100, 124)), {}, (5,), (6,))
    assert describe(long).startswith("ChatFormat(begin=a tuple of 40, begin_default=(100, 101,")
    assert " ..., before={}, end=(5,), gap=(6,))" in describe(long)

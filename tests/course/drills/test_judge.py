"""A typed answer is read as people write it; what cannot be judged gets a sentence and costs nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_lab.course.drills import judge, numbers, quantity, sandbox
from finetune_lab.course.drills.schema import Bug, Case, Code, Number, Point, UnitMistake, WrongFix, WrongNumber
from finetune_lab.errors import UserError

PLACE = {
    "level": "basic", "minutes": 1, "topic": "t", "lesson": "00", "tags": (), "rows": (), "sources": (),
}  # fmt: skip


def drawn(answer, unit, tolerance=0.01, unit_mistakes=(), wrong=()):
    item = Number(
        id="n", kind="number", question="?", draw={}, compute="", arguments={}, unit=unit, tolerance=tolerance,
        solution="{answer}", unit_mistakes=unit_mistakes, **PLACE,
    )  # fmt: skip
    return numbers.Drawn(item, 0, {}, "?", "", answer, tuple(wrong))


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("16.8M", 16.8e6, ""), ("4,194,304", 4194304, ""), ("4 194 304", 4194304, ""), ("1.048.576", 1048576, ""),
        ("3.6 GB", 3.6, "GB"), ("3.6GB", 3.6, "GB"), ("1.5e9", 1.5e9, ""), ("1.5 × 10^9", 1.5e9, ""), ("10⁹", 1e9, ""),
        ("2**20", 2**20, ""), ("≈ 12 %", 12, "%"), ("0,5", 0.5, ""), ("0,500", 0.5, ""), ("3,500", 3500, ""),
        ("about 7 B parameters", 7e9, "parameters"), ("3/11", 3 / 11, ""), ("−5", -5, ""), (".5", 0.5, ""), ("5.", 5, ""),
        ("３．６ GB", 3.6, "GB"), ("5 ms", 5, "ms"), (3.5, 3.5, ""), ("16.8 million", 16.8e6, ""), ("2 T tokens", 2e12, "tokens"),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, value, unit):
    assert quantity.read(text) == quantity.Quantity(pytest.approx(value), unit)


def test_a_lone_b_is_a_billion_except_of_bytes():
    assert quantity.read("7 B") == quantity.Quantity(7e9, "")
    assert quantity.read("7 B", of_bytes=True) == quantity.Quantity(7, "B")


@pytest.mark.parametrize("text", ["", "  ", None, "nan", "-inf", "no idea", "GB", "3-4 GB", "3 or 4", "1e999", "9^9999",
                                  "5/0", "x" * 500, "1,2,3", "2*3"])  # fmt: skip
def test_what_is_no_number_gets_a_sentence_and_is_not_counted(text):
    verdict = judge.number(drawn(3.6, "GB"), text)
    assert verdict.status == "again" and len(verdict.text) > 20 and verdict.score == 0


@given(
    st.text(max_size=40) | st.floats() | st.integers() | st.builds("{} {}".format, st.floats(), st.text(max_size=20))
)
def test_nothing_that_is_typed_raises(text):
    assert judge.number(drawn(3.6, "GB"), text).status in ("ok", "wrong", "again")


@pytest.mark.parametrize(
    ("unit", "dimension", "size"),
    [
        ("GB", "byte", 1e9), ("gb", "byte", 1e9), ("GiB", "byte", 2**30), ("bytes", "byte", 1), ("Gbit", "bit", 1e9),
        ("%", "", 0.01), ("per cent", "", 0.01), ("percent", "", 0.01), ("ms", "s", 1e-3), ("hours", "s", 3600),
        ("tokens/s", "token/s", 1), ("tokens per second", "token/s", 1), ("bytes per param", "byte/parameter", 1),
        ("TFLOPs", "flop", 1e12), ("million parameters", "parameter", 1e6), ("GB per GPU", "byte/gpu", 1e9),
    ],
)  # fmt: skip
def test_units_have_a_dimension_and_a_size(unit, dimension, size):
    assert quantity.unit_of(unit) == (dimension, pytest.approx(size))


@pytest.mark.parametrize(
    ("answer", "unit", "text", "status", "says"),
    [
        (3.6, "GB", "3.6 GB", "ok", "right"),
        (3.6, "GB", "3600 MB", "ok", "right"),
        (3.6, "GB", "3.353 GiB", "ok", "precisely 3.6 GB"),
        (3.6, "GB", "3.6", "again", "of what?"),
        (3.6, "GB", "3.6 tokens", "again", "asked in GB"),
        (3.6, "GB", "3.6 MB", "again", "factor of 1,000"),
        (3.6, "GB", "28.8 GB", "again", "bits and bytes"),
        (3.6, "GB", "3.65 GB", "wrong", "close"),
        (3.6, "GB", "7.2 GB", "wrong", "2 times too large"),
        (3.6, "GB", "0.9 GB", "wrong", "4 times too small"),
        (3.6, "GB", "-3.6 GB", "wrong", "sign"),
        (12.0, "%", "0.12", "again", "asked in %"),
        (0.12, "", "12 %", "ok", "right"),
        (0.12, "", "12", "again", "factor of 100"),
        (16777216, "parameters", "16.8M", "ok", "precisely 16,777,216 parameters"),
        (16777216, "parameters", "16,777,216 params", "ok", "right"),
        (16777216, "parameters", "16777216 GB", "again", "asked in parameters"),
        (2.0, "times", "2x", "ok", "right"),
        (0, "", "0", "ok", "right"),
        (0, "", "1", "wrong", "not yet"),
    ],
)  # fmt: skip
def test_a_number_and_its_unit_are_judged_together(answer, unit, text, status, says):
    verdict = judge.number(drawn(answer, unit), text)
    assert (verdict.status, verdict.score) == (status, float(status == "ok")) and says in verdict.text, verdict.text


def test_an_exact_answer_does_not_take_a_rounded_one():
    assert judge.number(drawn(16777216, "parameters", tolerance=0), "16.8M").text.startswith("close, but every digit")
    assert judge.number(drawn(16777216, "parameters", tolerance=0), "16.777216 M").status == "ok"


def test_mistakes_that_the_item_knows_lend_their_hint_before_the_general_ones():
    asked = drawn(3.6, "GB", unit_mistakes=(UnitMistake(2, "halve it"),), wrong=[(5.0, "not five"), (5.0, "nor 5")])
    assert judge.number(asked, "7.2 GB") == judge.Verdict("again", "halve it")
    assert judge.number(asked, "5 GB") == judge.Verdict("wrong", "not five Or: nor 5")


def test_numbers_are_drawn_by_seed_and_mistakes_computed_from_the_same_draw():
    item = Number(
        id="n", kind="number", question="{m[name]} {n:,}", draw={"m": [{"name": "a", "w": 3}, {"name": "b", "w": 5}],
        "n": {"low": 1000, "high": 3000, "step": 1000}, "x": {"low": 0.1, "high": 0.3, "step": 0.1}},
        compute="finetune_lab.methods.counts:lora_parameters",
        arguments={"in_features": "m.w", "out_features": "n", "rank": 2}, unit="", tolerance=0, solution="{answer} {x}",
        scale=10, wrong=(WrongNumber("w", arguments={"rank": 1}), WrongNumber("f", factor=3)), **PLACE,
    )  # fmt: skip
    seen = set()
    for seed in range(30):
        one = numbers.draw(item, seed)
        assert one == numbers.draw(item, seed)
        width, n = one.values["m"]["w"], one.values["n"]
        assert one.answer == 2 * (width + n) / 10 and one.question == f"{one.values['m']['name']} {n:,}"
        assert [value for value, _ in one.wrong] == [pytest.approx(one.answer / 2), pytest.approx(one.answer * 3)]
        seen.add((n, one.values["x"]))
    assert {n for n, _ in seen} == {1000, 2000, 3000} and {x for _, x in seen} == {0.1, 0.2, 0.3}


CASE = Case(
    id="c", kind="case", question="?", answer="!", rubric=tuple(Point(f"p{i}", w, "why") for i, w in enumerate((3, 1, 1))),
    **PLACE,
)  # fmt: skip


def test_a_case_is_scored_by_weight():
    assert judge.case(CASE, {0}) == judge.Verdict("ok", "3 of 5 points; you missed: p1 (why)", 0.6)
    assert judge.case(CASE, [1, 2]).status == "wrong" and judge.case(CASE, [1, 2]).score == 0.4
    assert judge.case(CASE, [0, 1, 2]).text == "5 of 5 points"
    assert judge.case(CASE, []).score == 0
    assert judge.case(CASE, [3]).status == judge.case(CASE, ["x"]).status == judge.case(CASE, None).status == "again"


BUG = Bug(
    id="b", kind="bug", question="?", snippet="def run():\n    x = 1  # one\n    return x\n", line=2, fix="x = 2",
    explain="two", detector="d", wrong_fixes=(WrongFix("x = 3", "not three"), WrongFix("x = 4", "not four")), **PLACE,
)  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """What was given to the sandbox; the detector wants run() == 2."""
    jobs = []

    def run(job):
        jobs.append(job)
        namespace = {}
        exec(job["snippet"], namespace)  # noqa: S102 (our own)
        return sandbox.Result("ok", "") if namespace["run"]() == 2 else sandbox.Result("wrong", "caught")

    monkeypatch.setattr(sandbox, "run", run)
    return jobs


@pytest.mark.parametrize(
    ("line", "text", "status", "says"),
    [
        (2, "x = 2", "ok", "two"),
        ("2", "    x=2 # fixed", "ok", "two"),
        (2, "x = 1\nx += 1", "ok", "two"),
        (3, "return x + 1", "ok", "two"),
        (2, "x  =  3", "wrong", "not three"),
        (2, "x = 9", "wrong", "still wrong: caught"),
        (3, "return x * 3", "wrong", "line 3 is not the one. still wrong: caught"),
        (2, "x = 1", "not attempted", "as it was"),
        (0, "x = 2", "again", "lines 1 to 3"),
        ("two", "x = 2", "again", "by its number"),
        (None, None, "again", "by its number"),
    ],
)
def test_a_repair_is_judged_by_what_it_does(ran, line, text, status, says):
    verdict = judge.bug(BUG, line, text)
    assert verdict.status == status and says in verdict.text, verdict.text


def test_a_line_can_be_deleted(ran):
    assert judge.repaired(BUG, 2, "") == "def run():\n\n    return x\n"


@pytest.mark.parametrize(("one", "other", "same"), [("a = 1", " a=1  # x", True), ("for a in b:", "for a in  b :", True),
                                                    ("f('x')", 'f("x")', True), ("a = 1", "a = 2", False), ("a ((", "a  ((", True)])  # fmt: skip
def test_lines_are_compared_by_meaning(one, other, same):
    assert judge.same_code(one, other) is same


def test_an_untouched_starter_starts_no_process(ran):
    item = Code(
        id="c", kind="code", question="?", starter="def f(x): ...", reference="", exercise="e", limit_minutes=1, **PLACE
    )
    assert {judge.code(item, text).status for text in ("", None, "def f(x): ...  # mine")} == {"not attempted"}
    assert ran == []


def test_a_card_takes_the_learners_own_word():
    assert [judge.card(None, word).score for word in ("again", "hard", "Good ", "easy")] == [0, 0.5, 1, 1]
    assert judge.card(None, "great").status == "again"


def test_read_names_what_it_cannot_read():
    with pytest.raises(UserError, match="'-4 GB'"):
        quantity.read("3-4 GB")

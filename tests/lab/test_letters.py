"""The shop's old letters, and the rule that judges what a policy writes."""

from finetune_lab.lab import letters, tasks

ITEMS = tasks.load_task("reply", "test", 6)
GOOD = [[item["completion"][0]["content"]] for item in ITEMS]
BAD = [[item["rejected"][0]["content"]] for item in ITEMS]


def test_the_rule_tells_the_two_letters_of_a_pair_apart():
    assert letters.good_share(GOOD, ITEMS) == 1 and letters.good_share(BAD, ITEMS) == 0
    assert set(letters.fault_shares(GOOD, ITEMS).values()) == {0.0}
    assert max(letters.fault_shares(BAD, ITEMS).values()) > 0


def test_a_policy_ties_with_itself_and_wins_against_a_worse_one():
    assert letters.win_rate(GOOD, GOOD, ITEMS) == 0.5
    assert letters.win_rate(GOOD, BAD, ITEMS) == 1 == 1 - letters.win_rate(BAD, GOOD, ITEMS)


def test_old_letters_hold_the_wanted_share_of_good_ones():
    many = tasks.load_task("reply", "train", 300)
    kept = [mixed["completion"] == item["completion"] for mixed, item in
            zip(letters.old_letters(many, good=0.7, seed=1), many, strict=True)]  # fmt: skip
    assert 0.6 < sum(kept) / len(kept) < 0.8
    assert all(old["completion"] == item["rejected"] for old, item in
               zip(letters.old_letters(many, good=0.0), many, strict=True))  # fmt: skip

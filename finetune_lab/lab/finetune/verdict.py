"""Two sentences on top of the report of preference training: was the preference learned, and what became of the answers?

The first does not imply the second. The loss asks only for a gap between two answers, and a policy can open it while
what it writes falls apart (lesson 06). So: the accuracy against chance (the interval of `silent.few_scored`), then the
answers themselves, by the task's rule where there is one, else by signs: how likely the better answers are, the
number of words, how many answers changed at all. Signs are no proof: read the samples. Leaves out: judges (lesson 14).
"""

import math

LESS_LIKELY = 0.1  # a fall of the chosen log-probability by this share of itself is a sign of damage
OTHER_LENGTH = 0.25  # so is a change of the mean number of words by this share
NOTHING_TO_GAIN = 0.95  # share of pairs whose better answer was the likelier one before training


def lines(report: dict) -> list[str]:
    """The verdict on a finished run of pairs or labels (the values of report.json); [] where nothing was scored."""
    before, after = report["before"], report["after"]
    if "accuracy" not in before or "accuracy" not in after:
        return []
    return [learned(before, after, report["scored_rows"]), written(before, after, report)]


def learned(before: dict, after: dict, rows: int) -> str:
    """Is the accuracy above 1/2 by more than chance allows (1.96 sqrt(1/4 / n))?"""
    half, share = 0.98 / math.sqrt(rows), after["accuracy"]
    word = "yes" if share - half > 0.5 else "no, the other way round" if share + half < 0.5 else "not shown"
    text = (
        f"Preference learned: {word}. The better answer has the higher reward in {share:.0%} of the held-out pairs (50% "
        f"before; chance alone gives {max(0, 0.5 - half):.0%} to {min(1, 0.5 + half):.0%})."
    )
    if before["likelier"] >= NOTHING_TO_GAIN:
        text += f" Little was left to learn: the better answer was the likelier one in {before['likelier']:.0%} before training."
    return text


def written(before: dict, after: dict, report: dict) -> str:
    """Did what the model writes improve, stay or get worse?"""
    same = report.get("unchanged")
    if same == 1:
        return "Answers: nothing changed in what it writes, all its answers are the same as before."
    signs = damage(before, after)
    if "good" in after:
        half = 1.96 * math.sqrt(sum(p["good"] * (1 - p["good"]) for p in (before, after)) / report["scored_rows"])
        moved = after["good"] - before["good"]
        word = "improved" if moved > half else "got worse" if moved < -half else "no clear change"
        text = f"Answers: {word}. {before['good']:.0%} were good before, {after['good']:.0%} are now"
    else:
        word = (
            "perhaps worse (no rule scores them): read the samples"
            if signs
            else "no sign of damage (no rule scores them)"
        )
        text = f"Answers: {word}"
    facts = signs or [f"{before['words']:.1f} words before and {after['words']:.1f} now"]
    if same is not None:
        facts.append(f"{same:.0%} of the answers are unchanged")
    return f"{text}; {', '.join(facts)}."


def damage(before: dict, after: dict) -> list[str]:
    """Signs that the answers broke, as phrases."""
    found, (then, now) = [], (before["chosen_logp"], after["chosen_logp"])
    if now < then - LESS_LIKELY * abs(then):
        found.append(f"the better answers became less likely ({then:.1f} to {now:.1f} nats)")
    if abs(after["words"] - before["words"]) > OTHER_LENGTH * before["words"]:
        found.append(f"the length went from {before['words']:.1f} to {after['words']:.1f} words")
    return found

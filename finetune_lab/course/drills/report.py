"""What the answers say: the score card of a session, weak spots and where to reread them, the history and its picture.

`score_card` and `history` give figures (they are what --json prints); the `..._text` functions print the same ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from statistics import fmean

from fsrs import Card

from finetune_lab.course.drills import state
from finetune_lab.course.drills.schema import Item
from finetune_lab.course.drills.session import Answer, known_topics

WEAK = 0.6  # a topic scored under this is a weak spot


def score_card(answers: Sequence[Answer], planned: Sequence[Item], minutes: float) -> dict:
    """The figures of a mock interview; questions weigh by their minutes. `score` is None when nothing was answered.

    `reread` lists, for each weak spot, the lesson and the section that teaches it (None: not written yet).
    """
    by_topic = _by(answers, "topic")
    weak = sorted((t for t, row in by_topic.items() if row["score"] < WEAK), key=lambda t: (by_topic[t]["score"], t))
    answered = {answer.item.id for answer in answers}
    return {
        "minutes": minutes,
        "minutes_used": round(sum(answer.seconds for answer in answers) / 60, 1),
        "planned": len(planned),
        "answered": len(answers),
        "not_reached": [item.id for item in planned if item.id not in answered],
        "score": _score(answers) if answers else None,
        "by_kind": _by(answers, "kind"),
        "by_topic": by_topic,
        "weak_spots": weak,
        "reread": reread([answer.item for answer in answers if answer.item.topic in weak]),
        "answers": [
            {"id": a.item.id, "kind": a.item.kind, "topic": a.item.topic, "score": round(a.score, 3),
             "rating": a.rating, "seconds": round(a.seconds, 1)}
            for a in answers
        ],
    }  # fmt: skip


def _score(answers: Sequence[Answer]) -> float:
    weight = sum(answer.item.minutes for answer in answers)
    return round(sum(answer.score * answer.item.minutes for answer in answers) / weight, 3)


def _by(answers: Iterable[Answer], field: str) -> dict[str, dict]:
    groups = defaultdict(list)
    for answer in answers:
        groups[getattr(answer.item, field)].append(answer)
    return {
        name: {"answered": len(group), "score": _score(group), "minutes": round(sum(a.seconds for a in group) / 60, 1)}
        for name, group in sorted(groups.items())
    }


def reread(items: Iterable[Item]) -> list[dict]:
    """Where to read about these items, once each: lesson, its title, section (of the item, else of its topic)."""
    known = known_topics()
    places = {}
    for item in items:
        topic = known.get(item.topic)
        section = item.section or (topic.section if topic and topic.status == "written" else None)
        title = next((one.title for one in known.values() if one.lesson == item.lesson), "")
        place = {"topic": item.topic, "lesson": item.lesson, "title": title, "section": section}
        places.setdefault((item.lesson, section or item.topic), place)
    return [places[key] for key in sorted(places)]


def history(log: Sequence[state.Review], items: Sequence[Item], now: datetime) -> dict:
    """The figures of everything answered so far.

    `right` is the share rated good or easy; `known` the share of a topic's answered items whose last answer was that;
    `recall` the probability, by FSRS, of still knowing them in a week without practice, averaged. Days are those of
    this machine's clock. Items that left the bank count in the days only.
    """
    cards, engine = state.cards(log), state.scheduler()
    bank = {item.id: item for item in items}
    last = {review.item: review.rating for review in log}
    days, topics = defaultdict(list), defaultdict(list)
    for review in log:
        days[review.time.astimezone().date().isoformat()].append(review)
    for id, card in cards.items():
        if id in bank:
            recall = engine.get_card_retrievability(card, now + timedelta(days=7))
            topics[bank[id].topic].append((card.due <= now, last[id] >= 3, recall))
    return {
        "reviews": len(log),
        "items_answered": sum(id in bank for id in cards),
        "items": len(bank),
        "due": sum(due for rows in topics.values() for due, _, _ in rows),
        "days": [
            {"day": day, "reviews": len(group), "right": round(fmean(r.rating >= 3 for r in group), 3),
             "minutes": round(sum(r.seconds for r in group) / 60, 1)}
            for day, group in sorted(days.items())
        ],
        "topics": [
            {"topic": topic, "answered": len(rows), "due": sum(due for due, _, _ in rows),
             "known": round(fmean(known for _, known, _ in rows), 3),
             "recall": round(fmean(recall for _, _, recall in rows), 3)}
            for topic, rows in sorted(topics.items())
        ],
        "mocks": _mocks(log),
    }  # fmt: skip


def _mocks(log: Iterable[state.Review]) -> list[dict]:
    """Every mock interview in the log: when it began, how many questions, the score (weighed by minutes)."""
    groups = defaultdict(list)
    for review in log:
        if review.detail.get("mock"):
            groups[review.detail["mock"]].append(review.detail)
    return [
        {
            "began": began,
            "answered": len(rows),
            "score": round(
                sum(r.get("score", 0) * r.get("minutes", 1) for r in rows) / sum(r.get("minutes", 1) for r in rows), 3
            ),
        }
        for began, rows in sorted(groups.items())
    ]


def label(item: Item) -> str:
    """The line above a question."""
    return f"{item.kind}, {item.level}, {item.minutes} min: {topic_name(item.topic)} (lesson {item.lesson})"


def topic_name(id: str) -> str:
    return known_topics()[id].en if id in known_topics() else id


def sources_text(item: Item) -> str:
    """One line of markdown: where the answer comes from."""
    names = []
    for source in item.sources:
        if source.arxiv:
            names.append(f"[{source.title}, arXiv {source.arxiv}](https://arxiv.org/abs/{source.arxiv})")
        elif source.url:
            names.append(f"[{source.title}]({source.url})")
        else:
            names.append(f"{source.title}, `{source.library}`")
    return "Sources: " + "; ".join(names)


def practice_text(answers: Sequence[Answer], cards: dict[str, Card]) -> str:
    """The end of a practice session: how many were known, and when the next one comes back."""
    if not answers:
        return "Nothing answered, nothing stored."
    known = sum(answer.rating >= 3 for answer in answers)
    minutes = sum(answer.seconds for answer in answers) / 60
    lines = [f"{len(answers)} answered in {minutes:.1f} minutes: {known} known, {len(answers) - known} to repeat."]
    due = min((cards[answer.item.id].due, answer.item.id) for answer in answers if answer.item.id in cards)
    lines.append(f"The first comes back on {due[0].astimezone():%Y-%m-%d %H:%M} ({due[1]}).")
    return "\n".join(lines + _reread_lines(reread(answer.item for answer in answers if answer.score < WEAK)))


def score_text(figures: dict) -> str:
    """The score card of a mock interview."""
    if figures["score"] is None:
        return "Score card: nothing was answered."
    asked = f"{figures['answered']} of {figures['planned']} questions"
    spent = f"{figures['minutes_used']} of {figures['minutes']:g} minutes"
    lines = [f"Score card: {100 * figures['score']:.0f} % of what was asked ({asked}, {spent})"]
    for title, rows in (("by kind", figures["by_kind"]), ("by topic", figures["by_topic"])):
        lines.append(title)
        for id, row in sorted(rows.items(), key=lambda pair: (pair[1]["score"], pair[0])):
            lines.append(
                f"  {100 * row['score']:>3.0f} %  {topic_name(id)}  ({row['answered']} asked, {row['minutes']} min)"
            )
    if figures["not_reached"]:
        lines.append(f"not answered: {', '.join(figures['not_reached'])}")
    weak = figures["weak_spots"]
    lines.append(f"weak spots: {', '.join(map(topic_name, weak))}" if weak else "no weak spot in this interview")
    return "\n".join(lines + _reread_lines(figures["reread"]))


def _reread_lines(places: Iterable[dict]) -> list[str]:
    lines = []
    for place in places:
        where = f'section "{place["section"]}"' if place["section"] else "not written yet"
        lines.append(f"  reread lesson {place['lesson']} {place['title']}: {where} ({topic_name(place['topic'])})")
    return lines


def history_text(figures: dict) -> str:
    """The history as a table."""
    if not figures["reviews"]:
        return "Nothing answered yet: finetune-lab drill"
    lines = ["day         answers  right  minutes"]
    for row in figures["days"]:
        lines.append(f"{row['day']}  {row['reviews']:>7}  {100 * row['right']:>3.0f} %  {row['minutes']:>7.1f}")
    lines += ["", "known  in a week  due  answered  topic"]
    for row in sorted(figures["topics"], key=lambda row: (row["recall"], row["topic"])):
        share, later = f"{100 * row['known']:.0f} %", f"{100 * row['recall']:.0f} %"
        lines.append(f"{share:>5}  {later:>9}  {row['due']:>3}  {row['answered']:>8}  {topic_name(row['topic'])}")
    for row in figures["mocks"]:
        began = datetime.fromisoformat(row["began"]).astimezone()
        lines.append(f"mock interview {began:%Y-%m-%d %H:%M}: {100 * row['score']:.0f} % of {row['answered']} answers")
    lines.append(
        f"\n{figures['reviews']} answers; {figures['items_answered']} of {figures['items']} questions met, "
        f"{figures['due']} due now"
    )
    return "\n".join(lines)


def plot(figures: dict):
    """(figure, alternative text): answers a day, those known hatched below those to repeat."""
    from finetune_lab.course import plots

    days = figures["days"][-30:]
    answers = [row["reviews"] for row in days]
    right = [round(row["right"] * row["reviews"]) for row in days]
    share = f"{100 * sum(right) / sum(answers):.0f} % known"
    figure, ax = plots.axes(
        f"{_count(sum(answers), 'answer')} on {_count(len(days), 'day')}, {share}", "day", "answers"
    )
    missed = [n - r for n, r in zip(answers, right, strict=True)]
    at = range(len(days))
    ax.bar(at, right, color="white", edgecolor=plots.BLUE, hatch="//", label="known (good, easy)")
    ax.bar(at, missed, bottom=right, color="white", edgecolor=plots.VERMILLION, hatch="..", label="to repeat")
    every = max(1, len(days) // 8)
    ax.set_xticks(list(at)[::every], [row["day"][5:] for row in days][::every])
    ax.yaxis.get_major_locator().set_params(integer=True)
    ax.set(xlim=(-0.6, max(len(days), 7) - 0.4), ylim=(0, 1.3 * max(answers)))
    ax.legend(loc="upper left", ncols=2)
    return figure, f"Answers a day from {days[0]['day']} to {days[-1]['day']}: {sum(answers)} in all, {share}."


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"

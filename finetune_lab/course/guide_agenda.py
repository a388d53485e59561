"""Agendas for a workshop, computed from the minutes of the lessons' sections: a break never cuts a section.

A day is: arrival, sections in order, as few breaks as keep each stretch of work within STRETCH minutes and EXERCISES
exercises, spread as evenly as the sections allow, lunch at the break nearest to NOON on long days, and a close. What does
not fit before the END of a day is left out by name: lessons that WORKSHOPS does not list, exercises in HOME.
"""

from dataclasses import dataclass, replace

from finetune_lab.course.guide_lesson import Section, Sheet

START, ARRIVAL, CLOSE = 9 * 60, 15, 10  # minutes after midnight; minutes
STRETCH, EXERCISES, BREAK = 85, 5, 10  # the most between two breaks; minutes
LUNCH, NOON = 60, 12 * 60 + 15
BEGIN, ORPHAN = 15, 1500  # minutes of a lesson that should not stand alone beside a break, and what that costs
LONG_DAY = 300  # minutes of lessons from which a day has a lunch
END = {False: 13 * 60 + 30, True: 17 * 60 + 30}  # is it a long day? -> when it has to be over

WORKSHOPS = {  # title: the lessons of each day
    "Half a day": [["00", "01", "03"]],
    "Two days": [["00", "01", "02", "03"], ["05", "06", "07", "16"]],
}
HOME: dict[str, tuple[str, ...]] = {  # title: exercises for which there is no time
    "Half a day": ("1.6", "1.7", "3.4", "3.5"),
    "Two days": (),
}


@dataclass(frozen=True)
class Row:
    """One line of an agenda: when it starts (minutes after midnight), how long it takes, what it is."""

    start: int
    minutes: int
    what: str
    stops: str = ""


def clock(minutes: int) -> str:
    return f"{minutes // 60:02d}:{minutes % 60:02d}"


def _exercises(found: list[Section]) -> list[str]:
    return [stop.id for section in found for stop in section.stops if stop.kind == "exercise"]


def without(sheet: Sheet, home: tuple[str, ...]) -> Sheet:
    """The lesson with these exercises, and their minutes, left out."""
    found = []
    for section in sheet.sections:
        out = [stop for stop in section.stops if stop.id in home]
        left = [stop for stop in section.stops if stop.id not in home]
        found.append(replace(section, stops=left, minutes=section.minutes - sum(int(stop.minutes) for stop in out)))
    return replace(sheet, sections=found)


def stretches(work: list[tuple[Sheet, Section]]) -> list[list[tuple[Sheet, Section]]]:
    """The sections cut at the breaks: the fewest stretches within the limits, and of these the most even."""
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # (stretches, unevenness, where the last begins) of the first n
    for end in range(1, len(work) + 1):
        ways = []
        for start in range(end - 1, -1, -1):
            part = work[start:end]
            minutes = sum(section.minutes for _, section in part)
            if start < end - 1 and (minutes > STRETCH or len(_exercises([section for _, section in part])) > EXERCISES):
                break
            ways.append((best[start][0] + 1, best[start][1] + minutes**2 + ORPHAN * _orphans(part), start))
        best.append(min(ways))
    cuts, end = [], len(work)
    while end:
        cuts.append(work[best[end][2] : end])
        end = best[end][2]
    return cuts[::-1]


def _orphans(part: list[tuple[Sheet, Section]]) -> int:
    """How many lessons are cut so that less than BEGIN minutes of them stand in this stretch."""
    count = 0
    for lesson in dict.fromkeys(sheet.lesson for sheet, _ in part):
        mine = [(sheet, section) for sheet, section in part if sheet.lesson == lesson]
        cut = len(mine) < len(mine[0][0].sections)
        count += cut and sum(section.minutes for _, section in mine) < BEGIN
    return count


def _lines(start: int, part: list[tuple[Sheet, Section]]) -> list[Row]:
    """One line for each lesson that is worked on between two breaks."""
    rows = []
    for lesson in dict.fromkeys(sheet.lesson for sheet, _ in part):
        mine = [(one, section) for one, section in part if one.lesson == lesson]
        whole, found = mine[0][0], [section for _, section in mine]
        title = f"**{lesson.number} {whole.title}**"
        if len(found) < len(whole.sections):
            first, last = found[0].title, found[-1].title
            title += f": {first}" if first == last else f": {first} … {last}"
        minutes = sum(section.minutes for section in found)
        rows.append(Row(start, minutes, title, ", ".join(_exercises(found))))
        start += minutes
    return rows


def day(sheets: list[Sheet]) -> list[Row]:
    """The lines of one day with these lessons."""
    parts = stretches([(sheet, section) for sheet in sheets for section in sheet.sections])
    worked = [sum(section.minutes for _, section in part) for part in parts]
    starts = [START + ARRIVAL + sum(worked[:i]) + BREAK * (i - 1) for i in range(1, len(parts))]  # of the breaks
    lunch = min(starts, key=lambda at: abs(at - NOON)) if starts and sum(worked) > LONG_DAY else None
    rows = [Row(START, ARRIVAL, "arrival; everybody runs `finetune-lab doctor --class NAME`")]
    now = START + ARRIVAL
    for i, part in enumerate(parts):
        if i:
            eat = starts[i - 1] == lunch
            what = "lunch; collect the files of `finetune-lab doctor --class NAME`" if eat else "break"
            rows.append(Row(now, LUNCH if eat else BREAK, what))
            now += rows[-1].minutes
        rows += _lines(now, part)
        now += worked[i]
    return [*rows, Row(now, CLOSE, "questions; everybody hands in the file of `finetune-lab doctor --class NAME`")]


def days(title: str, sheets: dict[str, Sheet]) -> list[list[Sheet]]:
    """The lessons of each day of one of WORKSHOPS as they are taught there; lessons that do not exist are left out."""
    found = [[sheets[number] for number in numbers if number in sheets] for numbers in WORKSHOPS[title]]
    return [[without(sheet, HOME[title]) for sheet in one] for one in found if one]


def workshop(title: str, sheets: dict[str, Sheet]) -> str:
    """The agenda of one of WORKSHOPS as markdown."""
    taught = days(title, sheets)
    numbers = [sheet.lesson.number for one in taught for sheet in one]
    rest = [f"{number} {one.title} ({one.minutes} minutes)" for number, one in sheets.items() if number not in numbers]
    lines = [f"### {title}", ""]
    lines += [f"Left out, for lack of time: {', '.join(rest)}.", ""] if rest else []
    out = [stop for sheet in sheets.values() for section in sheet.sections for stop in section.stops]
    named = [f"{stop.id} {stop.title} ({stop.minutes} minutes)" for stop in out if stop.id in HOME[title]]
    if named:
        said = "Their sections are read; the lesson goes on with the reference."
        lines += [f"Exercises for home: {', '.join(named)}. {said}", ""]
    for number, lessons in enumerate(taught, 1):
        rows = day(lessons)
        end = rows[-1].start + rows[-1].minutes
        work = sum(sheet.minutes for sheet in lessons)
        name = f"Day {number}: " if len(taught) > 1 else ""
        lines += [f"{name}{clock(rows[0].start)} to {clock(end)}, {work} minutes of lessons.", ""]
        lines += ["| From | Minutes | What | Exercises |", "|---|---|---|---|"]
        lines += [f"| {clock(row.start)} | {row.minutes} | {row.what} | {row.stops} |" for row in rows]
        lines.append("")
    return "\n".join(lines)

"""Agendas for a workshop, computed from the minutes of the lessons' sections: a break never cuts a section.

A day is: arrival, sections in order, a break before the stretch of work gets longer than STRETCH minutes, lunch at the
first break after LUNCH_FROM on days that are long enough, and a close.
"""

from dataclasses import dataclass

from finetune_lab.course.guide_lesson import Section, Sheet

START, ARRIVAL, CLOSE = 9 * 60, 15, 10  # minutes after midnight; minutes
STRETCH, BREAK, LUNCH, LUNCH_FROM = 85, 10, 60, 11 * 60 + 45
BEGIN = 25  # a lesson is not begun for less than this before a break
LONG_DAY = 300  # minutes of lessons from which a day has a lunch

WORKSHOPS = {  # title: the lessons of each day
    "Half a day": [["00", "01", "03"]],
    "Two days": [["00", "01", "02", "03", "04"], ["05", "06", "07", "16"]],
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


def _stretch(start: int, part: list[tuple[Sheet, Section]]) -> list[Row]:
    """One line for each lesson that is worked on between two breaks."""
    rows = []
    for sheet in dict.fromkeys(sheet.lesson for sheet, _ in part):
        mine = [(one, section) for one, section in part if one.lesson == sheet]
        whole, found = mine[0][0], [section for _, section in mine]
        title = f"**{sheet.number} {whole.title}**"
        if len(found) < len(whole.sections):
            first, last = found[0].title, found[-1].title
            title += f": {first}" if first == last else f": {first} … {last}"
        minutes = sum(section.minutes for section in found)
        exercises = [stop.id for section in found for stop in section.stops if stop.kind == "exercise"]
        rows.append(Row(start, minutes, title, ", ".join(exercises)))
        start += minutes
    return rows


def day(sheets: list[Sheet]) -> list[Row]:
    """The lines of one day with these lessons."""
    long = sum(sheet.minutes for sheet in sheets) > LONG_DAY
    rows = [Row(START, ARRIVAL, "arrival; everybody runs `finetune-lab doctor --class NAME`")]
    now, part, worked, eaten = START + ARRIVAL, [], 0, not long
    for sheet in sheets:
        for section in sheet.sections:
            at = now + worked
            ahead = (
                section.minutes if section is not sheet.sections[0] else max(section.minutes, min(BEGIN, sheet.minutes))
            )
            if worked + ahead > STRETCH or (not eaten and at >= LUNCH_FROM and worked > 0):
                rows += _stretch(now, part)
                lunch = not eaten and at >= LUNCH_FROM
                rows.append(Row(at, LUNCH if lunch else BREAK, "lunch" if lunch else "break"))
                now, part, worked, eaten = at + rows[-1].minutes, [], 0, eaten or lunch
            part.append((sheet, section))
            worked += section.minutes
    rows += _stretch(now, part)
    rows.append(
        Row(now + worked, CLOSE, "questions; everybody hands in the file of `finetune-lab doctor --class NAME`")
    )
    return rows


def workshop(title: str, sheets: dict[str, Sheet]) -> str:
    """The agenda of one of WORKSHOPS as markdown; lessons that do not exist are left out."""
    days = [[sheets[number] for number in numbers if number in sheets] for numbers in WORKSHOPS[title]]
    lines = [f"### {title}", ""]
    for number, lessons in enumerate([one for one in days if one], 1):
        rows = day(lessons)
        end = rows[-1].start + rows[-1].minutes
        work = sum(sheet.minutes for sheet in lessons)
        name = f"Day {number}: " if len(days) > 1 else ""
        lines += [f"{name}{clock(rows[0].start)} to {clock(end)}, {work} minutes of lessons.", ""]
        lines += ["| From | Minutes | What | Exercises |", "|---|---|---|---|"]
        lines += [f"| {clock(row.start)} | {row.minutes} | {row.what} | {row.stops} |" for row in rows]
        lines.append("")
    return "\n".join(lines)

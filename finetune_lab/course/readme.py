"""The tables of README.md that come from somewhere else: what each lesson is, and what it took to run.

    python -m finetune_lab.course.readme        # writes README.md again; a test holds that it is current

A block stands between `<!-- NAME -->` and `<!-- /NAME -->`. Titles, minutes, needs and promises come from the lessons'
own first cells, machine time from the recorded runs of `finetune-lab run --json` in `evidence/run_MODEL.json`.
"""

import itertools
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from finetune_lab.course import build, guide_agenda, topics
from finetune_lab.course.lessons import course_root, lessons, write_atomic
from finetune_lab.errors import UserError


def machine_time(model: str) -> dict[str, float]:
    """Lesson's name -> seconds of its last recorded run on a model (empty when none was recorded).

    Raises:
        UserError: the record holds a failed run, which is no figure to publish.
    """
    record = resources.files("finetune_lab") / "evidence" / f"run_{model}.json"
    if not record.is_file():
        return {}
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    broken = [row["lesson"] for row in rows if row["failures"]]
    if broken:
        raise UserError(f"evidence/run_{model}.json holds failed runs of {', '.join(broken)}: run them again first.")
    return {row["lesson"]: row["seconds"] for row in rows}


def spoken(seconds: float | None) -> str:
    """`39 s`, `16 min`; a dash for a lesson that was not recorded."""
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def lesson_table(root: Path) -> str:
    tiny, small = machine_time("tiny"), machine_time("smollm2-135m")
    rows = ["| | lesson | minutes | needs | tiny | SmolLM2 | |", "|---|---|---|---|---|---|---|"]
    for lesson in lessons(root):
        notebook = build.parse(lesson)
        about, first = notebook.metadata["finetune_lab"], notebook.cells[0].source
        promise = re.search(r"^\*\*(.+?)\*\*$", first, re.MULTILINE)[1]  # the bold sentence under the title
        links = f"[read](solutions/{lesson.name}.ipynb) · [do](notebooks/{lesson.name}.ipynb)"
        cells = [lesson.number, f"**{about['title']}.** {promise}", about["minutes"], about["needs"],
                 spoken(tiny.get(lesson.name)), spoken(small.get(lesson.name)), links]  # fmt: skip
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    written = {one.number for one in lessons(root)}
    planned = sorted({f"{one.lesson} {one.title}" for one in topics.load() if one.lesson not in written})
    return "\n".join([*rows, "", f"Planned: {', '.join(planned)}."] if planned else rows)


def path_table(root: Path) -> str:
    """Three ways through the course; the workshops' lessons are those of the instructor's guide."""
    minutes = {one.number: build.parse(one).metadata["finetune_lab"]["minutes"] for one in lessons(root)}
    half, two = ([*itertools.chain(*days)] for days in guide_agenda.WORKSHOPS.values())
    hours = f"{sum(minutes.values()) / 60:.1f} hours"
    agenda = "agenda, run sheets and hints in the [instructor's guide](docs/instructor.md#agendas)"
    return f"""\
| you | time | how |
|---|---|---|
| learn by yourself | {hours} | `make lab`, then the lessons in order; `finetune-lab drill` after each |
| teach a workshop | half a day | lessons {", ".join(half)}; {agenda} |
| teach a workshop | two days | lessons {", ".join(two)}; `finetune-lab pack DIR` for a room without internet |
| have an interview in a week | an hour a day | lesson 16, then `finetune-lab drill` daily; what you miss names its lesson: \
read that one in `solutions/`; `finetune-lab drill --mock 45` on days 5 and 7 |"""


def tier_table(root: Path) -> str:
    """What each model is for, and what all lessons together took on it."""

    def taken(model: str) -> str:
        times = machine_time(model)
        missing = [one.number for one in lessons(root) if one.name not in times]
        span = f"{spoken(min(times.values()))} to {spoken(max(times.values()))} a lesson"
        return f"{span}, {sum(times.values()) / 60:.0f} min in all" + (
            f"; not recorded: {', '.join(missing)}" if missing else ""
        )

    return f"""\
| name | what it is | from where | measured on two cores |
|---|---|---|---|
| `tiny` (default) | a small Llama of 2.6 M parameters, pre-trained by this project on an invented world | in the package | \
{taken("tiny")} |
| `smollm2-135m` | SmolLM2-135M-Instruct, real English | `finetune-lab models fetch smollm2-135m`: 93 MB, 0.6 GB on disk | \
{taken("smollm2-135m")}; 05 to 07 beside other work, with 11, 9 and 13 GB of memory at their peak |
| a hub id or a folder | any causal language model in safetensors | the hub, your disk | not measured: a GPU is needed |"""


BLOCKS: dict[str, Callable[[Path], str]] = {"lessons": lesson_table, "paths": path_table, "tiers": tier_table}


def filled(text: str, root: Path) -> str:
    """`text` with every block made anew.

    Raises:
        UserError: a block's marks are missing.
    """
    for name, block in BLOCKS.items():
        marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not marks.search(text):
            raise UserError(f"README.md lacks the lines <!-- {name} --> and <!-- /{name} -->: put them back.")
        made = block(root)
        text = marks.sub(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", text)
    return text


def main() -> None:
    path = course_root() / "README.md"
    write_atomic(path, filled(path.read_text(encoding="utf-8"), path.parent))


if __name__ == "__main__":
    main()

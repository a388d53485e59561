"""`finetune-lab new-lesson NN_name "Title"`: a lesson that runs, with every part of the frame once, to be written over.

Five files: the lesson's source, the module of `methods` that it teaches, its exercises, and a test of each. They are
made from `assets/lesson`; `finetune-lab build NN --execute` builds them as they are. What a template cannot do is
the length: `finetune-lab lint NN` goes on asking for cells, words and exercises.
"""

import argparse
import re
from pathlib import Path

from finetune_lab.course.lessons import course_root, write_atomic
from finetune_lab.errors import UserError

TEMPLATES = Path(__file__).parent / "assets" / "lesson"
# template -> where it goes in the course folder
FILES = {
    "lesson.txt": "solutions/@NAME@.py",
    "method.txt": "finetune_lab/methods/@MODULE@.py",
    "exercises.txt": "finetune_lab/course/exercises/l@NN@.py",
    "test_method.txt": "tests/methods/test_@MODULE@.py",
    "test_lesson.txt": "tests/lessons/test_@NAME@.py",
}
NEXT = """next:
  finetune-lab build @NN@ --execute     # runs it on the tiny model; look at solutions/@NAME@.ipynb
  finetune-lab lint @NN@                # what is still missing: cells, words, exercises
  pytest tests/lessons tests/methods/test_@MODULE@.py -k "@NN@ or @MODULE@"
then write over every TODO and rename top_share. CONTRIBUTING.md goes on from here: drills, the list of topics, and the
pages that are made from the lessons."""


def fill(text: str, name: str, title: str) -> str:
    """A template with the lesson's number, names and title."""
    values = {"NN": name[:2], "N": str(int(name[:2])), "NAME": name, "MODULE": name[3:], "TITLE": title}
    return re.sub(r"@([A-Z]+)@", lambda match: values[match[1]], text)


def create(root: Path, name: str, title: str) -> list[Path]:
    """Write the five files; all of them or none.

    Raises:
        UserError: the name or the title is not one, the number is taken, a file exists, or `root` is no clone.
    """
    if not re.fullmatch(r"\d\d_[a-z][a-z0-9_]*", name):
        raise UserError(f"{name!r} is no name for a lesson: two digits, then small letters, like 08_lora_family.")
    if not re.fullmatch(r"\w[\w ,'()/+-]{0,59}", title):
        raise UserError(f"the title {title!r} must be 1 to 60 letters, digits, spaces and , ' ( ) / + - only.")
    if not (root / "finetune_lab" / "methods").is_dir():
        raise UserError(f"{root} has no finetune_lab/methods: a lesson is added in a clone of the repository.")
    taken = [path.name for path in (root / "solutions").glob(f"{name[:2]}_*.py")]
    paths = {template: root / fill(place, name, title) for template, place in FILES.items()}
    taken += [str(path.relative_to(root)) for path in paths.values() if path.exists() and path.name not in taken]
    if taken:
        raise UserError(f"{' and '.join(taken)} exist already: choose another number or name.")
    for template, path in paths.items():
        write_atomic(path, fill((TEMPLATES / template).read_text(encoding="utf-8"), name, title))
    return list(paths.values())


def _command(args: argparse.Namespace) -> None:
    root = course_root(args.root)
    for path in create(root, args.name, args.title):
        print(path.relative_to(root).as_posix())
    print(fill(NEXT, args.name, args.title))


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "new-lesson",
        help="start a lesson from a template that runs (authors)",
        description="Write the five files of a new lesson: source, method, exercises and their tests.",
        epilog='example: finetune-lab new-lesson 08_lora_family "The LoRA family"',
    )
    parser.add_argument("name", metavar="NN_name", help="the number and the name of the files, like 08_lora_family")
    parser.add_argument("title", help="the lesson's title, in quotes")
    parser.add_argument("--root", help="the course folder (default: found from here)")
    parser.set_defaults(func=_command)

"""Rows of a run: what is trained on, what is only scored. From a task, one's own JSONL, or a hub data set.

Every row passes `lab.data`, so a bad line stops the run before it starts, with all bad lines named at once. Rows of a
hub data set are written to a JSONL file first: they get the same checks, and the reader can look at them.
Leaves out: streaming, mixtures of data sets, tools and images.
"""

import hashlib
import json
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from finetune_lab.errors import UserError
from finetune_lab.lab import data, hub
from finetune_lab.lab.finetune.recipe import Recipe, tier_of

FILES = (".jsonl", ".json", ".csv", ".txt", ".parquet")  # a name that ends like this is a file, not a hub data set
COLUMNS = {"messages", "prompt", "completion", "chosen", "rejected", "label", "id", "meta"}


@dataclass(frozen=True)
class Rows:
    """`train` and `valid` hold rows in conversational form; `notes` are sentences about what was read."""

    kind: str
    train: list[dict]
    valid: list[dict] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    lines: tuple[int, ...] = ()  # of each training row in its file; empty where there is no file
    every: list[dict] = field(default_factory=list)  # the rows of the file before any were held out
    every_line: tuple[int, ...] = ()

    def fingerprint(self) -> str:
        """A hash of every row: a run that goes on must see the same data."""
        text = json.dumps([self.kind, self.train, self.valid], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(recipe: Recipe, tokenizer, parameters: int, kinds: tuple[str, ...]) -> Rows:
    """The rows of a completed recipe. kinds: the formats that the trainer takes, as in `data.FORMATS`.

    Raises data.DataError with every bad line, UserError for a file of another format or too few rows.
    """
    if recipe.task:
        return _task(recipe, parameters, kinds)
    notes: list[str] = []
    lines: list[int] = []
    rows = every = _load(recipe.data, tokenizer, recipe.special_tokens, notes, kinds, lines)
    kind = data.format_of(rows[0])
    if kind not in kinds:
        raise UserError(
            f"{recipe.data} holds {kind} data, but `{recipe.trainer()}` needs {' or '.join(kinds)} data "
            f"({' or '.join('{' + ', '.join(sorted(data.FORMATS[k])) + '}' for k in kinds)})."
        )
    if recipe.items:
        rows = every = rows[: recipe.items]
        lines = lines[: recipe.items]
    every_line, valid = lines, []
    if recipe.valid:
        valid = _load(recipe.valid, tokenizer, recipe.special_tokens, notes, kinds, [])
        if data.format_of(valid[0]) != kind:
            raise UserError(
                f"{recipe.valid} holds {data.format_of(valid[0])} data, {recipe.data} {kind} data: use one."
            )
    elif recipe.hold_out:
        rows, valid = split(every, recipe.hold_out, recipe.seed)
        kept = set(map(id, rows))  # the very rows, not equal ones
        lines = [line for row, line in zip(every, lines, strict=True) if id(row) in kept]
        notes.append(f"{len(valid)} rows were drawn from the data for scoring (hold_out {recipe.hold_out:g})")
    return Rows(kind, rows, valid, tuple(notes), tuple(lines), every, tuple(every_line))


def split(rows: list[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(train, held out): rows with the same prompt stay on one side, so that nothing scored was seen in training."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(prompt_key(row), []).append(i)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, kept = max(1, round(share * len(rows))), set()
    for group in order:
        if len(kept) >= wanted:
            break
        kept.update(group)
    if len(kept) == len(rows):
        raise UserError(
            f"hold_out {share:g} of {len(rows)} row(s) leaves nothing to train on: give more rows, or valid."
        )
    return [r for i, r in enumerate(rows) if i not in kept], [r for i, r in enumerate(rows) if i in kept]


def prompt_key(row: dict) -> str:
    """What the model is given in a row, as text: two rows with the same key ask the same thing."""
    return json.dumps(row["prompt"] if "prompt" in row else row["messages"][:-1], sort_keys=True)


def row_key(row: dict) -> str:
    """Everything that a row teaches, as text."""
    return json.dumps({k: v for k, v in row.items() if k not in data.KEPT}, sort_keys=True)


def _task(recipe: Recipe, parameters: int, kinds: tuple[str, ...]) -> Rows:
    tier = tier_of(parameters)
    items = tier.items(recipe.task, "train", recipe.items, recipe.seed)
    valid = tier.items(recipe.task, recipe.split, recipe.test_items) if recipe.test_items else []
    as_pair, archive = "preference" in kinds, random.Random(f"archive-{recipe.seed}")
    train = [_pair(item) if as_pair else _letter(item, archive) for item in items]
    keys = {item["key"] for item in items}
    seen = sum(item["key"] in keys for item in valid)
    words = "never used" if recipe.split == "test" else "used"
    note = f"{len(valid)} held-out items of {recipe.task} in words {words} in training; {seen} of them share their combination with a training item"
    if recipe.task == "reply" and not as_pair:
        note += "; half of the letters to imitate break the shop's rule: `finetune-lab dpo` mends that"
    if as_pair:
        valid = [_pair(item) | {"facts": item["facts"]} for item in valid]
    kind = "preference" if as_pair else "prompt-completion"
    return Rows(kind, train, valid, (note,) if valid else (), every=train)


def _letter(item: dict, archive: random.Random) -> dict:
    """What to imitate. For reply: the shop's archive, where a letter is good or bad with probability 1/2."""
    bad = "rejected" in item and archive.random() < 0.5
    return {"prompt": item["prompt"], "completion": item["rejected" if bad else "completion"]}


def _pair(item: dict) -> dict:
    return {"prompt": item["prompt"], "chosen": item["completion"], "rejected": item["rejected"]}


def _load(
    source: str, tokenizer, special_tokens: str, notes: list[str], kinds: tuple[str, ...], lines: list[int]
) -> list[dict]:
    """Rows of a JSONL file, or of a hub data set `owner/name` or `owner/name:split`. Adds sentences to `notes`, and the
    line of each row to `lines`."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source} is a folder. Give a JSONL file, or a hub data set (owner/name).")
    fetched = not path.exists() and path.suffix not in FILES and hub.looks_like_id(source.split(":")[0])
    if not path.exists() and not fetched:
        raise UserError(f"there is no file {source}: give a JSONL file, or a hub data set (owner/name).")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if fetched:
            path = _from_hub(source, Path(folder), notes)
        rows = data.load_jsonl(path, tokenizer=tokenizer, special_tokens=special_tokens, kinds=kinds, lines=lines)
    notes.extend(str(each.message) for each in caught if issubclass(each.category, UserWarning))
    return rows


def _from_hub(source: str, folder: Path, notes: list[str]) -> Path:
    """Fetch a data set with `datasets`, keep the columns we know, and write it as JSONL."""
    import datasets

    name, _, part = source.partition(":")
    try:
        table = datasets.load_dataset(name, split=part or "train")
    except Exception as error:  # datasets raises a dozen kinds, from no network to no such split
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the data set {source} could not be fetched: {first[:200]}") from error
    if dropped := sorted(set(table.column_names) - COLUMNS):
        notes.append(f"columns of {source} that are not used: {', '.join(dropped)}")
    path = folder / f"{name.replace('/', '--')}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for row in table.remove_columns(dropped):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path

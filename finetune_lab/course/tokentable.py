"""The token table: every token of a row with its id and label, as coloured and marked text.

    html, text = token_table(tokenizer, ids, labels)      # pure: for Explorer, or `show_tokens` to display it

A counted token has a solid blue frame, bold text and the mark ●; a masked one a dashed grey frame and the mark –.
Frame, weight and mark say the same as the colour. The text twin is a table that a screen reader or a terminal reads.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass

IGNORE_INDEX = -100
COUNTED = "background:#eaf3f9;color:#000;border:2px solid #0072b2;font-weight:bold"
MASKED = "background:#fff;color:#4d4d4d;border:2px dashed #767676"
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


@dataclass(frozen=True)
class TokenRow:
    """One token. `predicted_by`: the position whose logits are scored against its label; None when nothing is."""

    position: int
    token: str
    id: int
    label: int
    predicted_by: int | None

    @property
    def counted(self) -> bool:
        return self.predicted_by is not None


def visible(tokenizer, token_id: int) -> str:
    """The token as it can be printed: white space as signs; a fragment of a character as the vocabulary writes it."""
    text = tokenizer.decode([token_id])
    return (tokenizer.convert_ids_to_tokens(token_id) if "�" in text or not text else text).translate(VISIBLE)


def token_rows(tokenizer, ids: Sequence[int], labels: Sequence[int]) -> list[TokenRow]:
    """A row for each token. The first token never counts, whatever its label: nothing stands in front of it.

    Raises ValueError when ids and labels differ in length.
    """
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} ids and {len(labels)} labels: give one label a token")
    return [
        TokenRow(t, visible(tokenizer, int(i)), int(i), int(label), t - 1 if label != IGNORE_INDEX and t > 0 else None)
        for t, (i, label) in enumerate(zip(ids, labels, strict=True))
    ]


def summary(rows: Sequence[TokenRow]) -> str:
    counted = sum(row.counted for row in rows)
    return f"{len(rows)} tokens, {counted} counted, {len(rows) - counted} masked"


def as_text(rows: Sequence[TokenRow]) -> str:
    """An aligned table: position, token, id, label, and which logits are scored against the label."""
    width = max([len(row.token) for row in rows] + [5])
    lines = [f"{'pos':>4}  {'token':{width}}  {'id':>6}  {'label':>6}  counted"]
    for row in rows:
        mark = f"● by the logits at {row.predicted_by}" if row.counted else "–"
        lines.append(f"{row.position:4}  {row.token:{width}}  {row.id:6}  {row.label:6}  {mark}")
    return "\n".join([*lines, summary(rows)])


def as_html(rows: Sequence[TokenRow]) -> str:
    """The row as running text: one framed box a token, with its mark, id and label."""
    boxes = []
    for row in rows:
        style, mark, word = (COUNTED, "●", "counted") if row.counted else (MASKED, "–", "masked")
        boxes.append(
            f'<span role="listitem" title="position {row.position}, id {row.id}, label {row.label}, {word}" '
            f'style="display:inline-block;margin:2px;padding:1px 5px;border-radius:4px;text-align:center;{style}">'
            f"{html.escape(row.token)} {mark}<br>"
            f'<small style="font-weight:normal">{row.id}<br>{row.label}</small></span>'
        )
    key = (
        f'<small>top: token, ● <span style="{COUNTED}">counted</span> or – <span style="{MASKED}">masked</span>; '
        "middle: id; bottom: label</small>"
    )
    return f'<div role="list" style="line-height:1.35">{"".join(boxes)}</div>{key}'


def token_table(tokenizer, ids: Sequence[int], labels: Sequence[int]) -> tuple[str, str]:
    """(html, one line of text) of a row and its labels: what an Explorer draws."""
    rows = token_rows(tokenizer, ids, labels)
    return as_html(rows), summary(rows)


def show_tokens(tokenizer, ids: Sequence[int], labels: Sequence[int]) -> None:
    """Display a row and its labels: boxes where HTML is shown, the aligned table elsewhere."""
    from IPython.display import display

    rows = token_rows(tokenizer, ids, labels)
    display({"text/html": as_html(rows) + f"<pre>{summary(rows)}</pre>", "text/plain": as_text(rows)}, raw=True)

"""A tiny lesson and its exercises: what the tests of the machine work on. Not a part of the course."""

import torch

from finetune_lab.course.checks import Wrong, case, exercise

SOURCE = '''# ---
# jupyter:
#   finetune_lab:
#     title: Masks
#     minutes: 5
#     needs: nothing
#     budget: start
# ---

# %% [markdown]
# # Masks
# Hide the prompt.

# %%
import torch

from finetune_lab.course import plots, predict

# %%
# BEGIN SOLUTION
guess = 4
# END SOLUTION
predict.number("99-p1", guess, 2 + 3)

# %%
def hide_prompt(ids: torch.Tensor, start: int) -> torch.Tensor:
    """Labels: -100 before `start`."""
    # BEGIN SOLUTION
    labels = ids.clone()
    labels[:, :start] = -100
    return labels
    # END SOLUTION

# %% tags=["solution"]
print("only in the solution")

# %%
print(hide_prompt.__name__)
'''


def hide_prompt(ids: torch.Tensor, start: int) -> torch.Tensor:
    """Labels: -100 where the prompt is. ids: (batch, length)."""
    labels = ids.clone()
    labels[:, :start] = -100
    return labels


def cases(draw):
    for batch, length in draw.sizes(4, 3, 9):
        yield case(draw.ints(1, 50, batch, length), start=draw.randint(1, length - 2))


def one_late(ids, start):
    return hide_prompt(ids, start + 1)


def rows_not_columns(ids, start):
    labels = ids.clone()
    labels[:start] = -100
    return labels


def zero(ids, start):
    labels = ids.clone()
    labels[:, :start] = 0
    return labels


def in_place(ids, start):
    ids[:, :start] = -100
    return ids


def one_dimensional(ids, start):
    return torch.cat([torch.full((start,), -100), ids[start:]])


class Scale(torch.nn.Module):
    """y = s x."""

    def __init__(self, s: float):
        super().__init__()
        self.s = s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.s * x


class Shift(Scale):
    def forward(self, x):
        return self.s + x


class Divide(Scale):
    def forward(self, x):
        return x / self.s


class Forgets(Scale):
    def forward(self, x):
        return x


def define() -> None:
    """Register the exercises (tests take them out again)."""
    exercise(
        "99.1",
        "hide the prompt",
        hide_prompt,
        cases,
        wrong=[
            Wrong(one_late, "one label too many is hidden: `start` itself is the first answer token"),
            Wrong(rows_not_columns, "you hid rows of the batch: positions are the second axis"),
            Wrong(zero, "0 is a token id; the loss ignores -100"),
            Wrong(in_place, "the ids themselves are overwritten: clone them first"),
            Wrong(one_dimensional, "ids are a batch (batch, length), not one row"),
        ],
    )
    exercise(
        "99.2",
        "a scaled layer",
        Scale,
        lambda draw: [case(draw.uniform(2, 3), draw.normal(2, 3))],
        call=lambda cls, s, x: cls(s)(x),
        wrong=[
            Wrong(Shift, "you add s; the layer multiplies"),
            Wrong(Divide, "you divide by s"),
            Wrong(Forgets, "s is not used"),
        ],
    )
    exercise(
        "99.3",
        "bytes of Adam",
        8,
        name="adam_bytes",
        wrong=[
            Wrong(4, "Adam keeps two numbers a parameter"),
            Wrong(2, "count bytes, not numbers"),
            Wrong(12, "weights are not its state"),
        ],
    )


def source_file(folder):
    """A course folder with the one lesson in it; returns the folder."""
    (folder / "solutions").mkdir(parents=True)
    (folder / "solutions" / "99_masks.py").write_text(SOURCE)
    return folder

# ---
# jupyter:
#   finetune_lab:
#     title: Interview drills
#     minutes: 20
#     needs: nothing; each drill names the lesson that teaches it
#     budget: start
# ---

# %% [markdown]
# # 16 · Interview drills
#
# **Answer aloud, get checked, and see each question again just before you would forget it.**
#
# Minutes: 20 a day. You need: nothing; each drill names the lesson and the section that teach it.
# You will be able to:
# - answer the questions that interviewers ask about fine-tuning, with the numbers worked out;
# - find the wrong line in code that trains without an error;
# - sit a timed mock interview and know what to read again.

# %%
import random
from datetime import UTC, datetime

from finetune_lab.course import decision, plots, predict, sheet
from finetune_lab.course.drills import report, schema, session, state
from finetune_lab.course.drills.widget import Drills

bank = schema.load()
for field, counts in schema.counts(bank).items():
    print(f"by {field}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))

# %% [markdown]
# ## Five kinds of questions
#
# | Kind | You do | Who checks |
# |---|---|---|
# | card | answer aloud, then compare; follow-ups and a common wrong answer come with it | you, honestly |
# | number | work it out: the parameters are drawn anew each time | the package computes the answer |
# | bug | name the wrong line and repair it | your repair runs, a detector watches |
# | code | write the function | hidden tests that know the typical mistakes |
# | case | design aloud, then tick a rubric | you, against a model answer |
#
# The terminal has the same drills: `finetune-lab drill`. Both write to one log in your data folder. Nothing leaves this
# machine.

# %% [markdown]
# ## Practise
#
# Enter answers, Tab reaches the buttons. "Give up" counts as *again*; "Skip" stores nothing. What is due comes first,
# then what is new, easy before hard. Without a running kernel you see the first question with its answer folded.
#
# Change the choice: `topic="lora"`, `level="expert"`, `kind="number"`, `lesson="03"`, `minutes=20`.

# %%
Drills(minutes=20, level="basic", seed=16)

# %% [markdown]
# ## Five warm-up questions
#
# These five come first in many interviews: how much data, which method for a 24 GB card, a model that got dumber,
# garbled answers, and when preferences are needed. About half an hour.

# %%
warm_up = ["how-much-data", "case-choose-a-method-for-24-gb", "case-dumber-after-sft",
           "garbled-answers", "when-preferences"]  # fmt: skip
Drills(items=[item for item in bank if item.id in warm_up], minutes=45, seed=1)

# %% [markdown]
# ## When a question comes back
#
# A fixed plan wastes time on what you know. FSRS models two things for each item: how hard it is for you, and how many
# days pass until your chance to recall it falls to 90 %. You only say *again*, *hard*, *good* or *easy*.
#
# **Predict, then run.** You rate a new question *good*, and again *good* each time it is due. The first two waits are
# ten minutes and two days. How many days is the fourth wait?

# %%
# BEGIN SOLUTION
guess = 14
# END SOLUTION


def waits(ratings):
    """Days until the question comes back, after each rating; each is given when it is due."""
    log, when, days = [], datetime(2026, 1, 1, tzinfo=UTC), []
    for rating in ratings:
        log.append(state.Review("a question", when, state.RATINGS[rating], 30))
        due = state.cards(log)["a question"].due
        days.append((due - when).total_seconds() / 86400)
        when = due
    return days


good = waits(["good"] * 5)
predict.number("16-p1", guess, round(good[3]), unit="days")

# %% [markdown]
# Each success multiplies the wait. One lapse does not start from nothing, but it costs most of it. Compare the waits
# after a lapse at the fourth answer.

# %%
lapse = waits(["good", "good", "good", "again", "good", "good"])
print("always good:     ", " -> ".join(f"{days:.3g} d" for days in good))
print("one lapse:       ", " -> ".join(f"{days:.3g} d" for days in lapse))
print("always easy:     ", " -> ".join(f"{days:.3g} d" for days in waits(["easy"] * 3)))

# %% [markdown]
# The model behind it is *FSRS-6*, from the package `fsrs`, with its published default weights and without random
# noise. Only your answers are stored; the dates are computed from them each time.

# %% [markdown]
# ## Mock interview
#
# 45 minutes, one try each, all kinds, topics as different as the bank allows. At the end: a score card, your weak spots,
# and the sections to read again. In the terminal: `finetune-lab drill --mock 45`.
#
# This is one that chance draws for the seed 1. Another seed gives another interview.

# %%
planned = session.interview(bank, 45, random.Random(1))
for item in planned:
    print(f"{item.minutes:>2} min  {item.kind:<6}  {item.level:<8}  {report.topic_name(item.topic)}")
print(f"{sum(item.minutes for item in planned)} minutes, {len({item.topic for item in planned})} topics")

# %% [markdown]
# Start it by running the next cell: the clock runs at once.

# %%
Drills(mock=45, seed=2)

# %% [markdown]
# ## Your history

# %%
figures = report.history(state.reviews(), bank, datetime.now(UTC))
print(report.history_text(figures))
if figures["reviews"]:
    plots.show(*report.plot(figures))

# %% [markdown]
# *Known* is your last answer. *In a week* is the chance, by FSRS, that you still know it then without practice.

# %% [markdown]
# ## Formula card
#
# The sheet is made from the same data as the lessons, and its examples are computed. Here is one lesson's part; the
# whole page is `finetune-lab sheet`.

# %%
from IPython.display import Markdown, display

parts = sheet.page().split("\n## ")
display(Markdown("## " + next(part for part in parts if part.startswith("03"))))

# %% [markdown]
# ## Which method?
#
# "Which method would you choose?" opens most design questions. Move a slider: what fits is computed, not looked up.

# %%
decision.chooser()

# %% [markdown]
# ## Take it with you
#
# - `finetune-lab drill export --anki deck.apkg`: an Anki deck. Import a newer one later: cards are updated, your schedule
#   stays.
# - `finetune-lab drill export --markdown drills.md --answers`: for printing, or for the one who plays the interviewer.
# - `finetune-lab troubleshoot`: symptom, cause, test, fix.
# - `finetune-lab topics --search WORD`: the glossary, in English and Chinese.
#
# A good answer in an interview has four parts: the formula or the mechanism, one number that you can work out on the
# spot, the failure that it causes when it is wrong, and the test that would show it.

"""Interview drills: a bank of questions whose answers are checked.

    bank/*.yml     the questions; schema.py says what a question must have
    schema.py      read the bank; rules.py and links.py say what is wrong with it
    exercises.py   where code drills get their hidden tests from
    numbers.py     draw the numbers of a question, compute its answer, read what a learner typed
    judge.py       the verdict on an answer of any kind
    sandbox.py     run a learner's code in a process of its own, with limits
    child.py       what runs inside that process

and the practice:

    dialogue.py    how each kind is asked; terminal.py and widget.py lead it
    session.py     which questions to ask; report.py: score card, weak spots, history
    state.py       the log of answers (SQLite), from which FSRS says what is due
    export.py      Anki decks and markdown; render.py: the bank's text as HTML and for a terminal
    cli.py         `finetune-lab drill`

The first group stores nothing: a verdict is returned, and the practice modules decide what to write down.
"""

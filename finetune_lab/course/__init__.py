"""The teaching machine: what turns lesson sources into notebooks, and answers into verdicts.

    lessons.py    where lessons live and how they are named
    build.py      solutions/NN_name.py -> notebooks/NN_name.ipynb and solutions/NN_name.ipynb
    lint.py       the budgets that every lesson keeps
    checks.py     the engine behind `check.<exercise>(answer)`; exercises/lNN.py hold the exercises
    progress.py   the learner's progress file
    runner.py     finetune-lab run, status, reset
    predict.py    predict, then run
    plots.py      pictures in the house style, with alternative text
    explorer.py   sliders on a picture, with a static fallback

A lesson imports `from finetune_lab.course import check, plots, predict`.
"""

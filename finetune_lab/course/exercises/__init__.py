"""One module a lesson: `l01.py` defines the exercises of lesson 01 with `finetune_lab.course.checks.exercise`."""

"""README's tables say what the lessons and the recorded runs say."""

import json
from pathlib import Path

import pytest

from finetune_lab.course import readme
from finetune_lab.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text, ROOT) == text, "run: python -m finetune_lab.course.readme"


def test_a_missing_mark_is_named():
    with pytest.raises(UserError, match="<!-- /lessons -->"):
        readme.filled("<!-- lessons -->", ROOT)


def test_a_failed_run_is_not_published(tmp_path, monkeypatch):
    record = {"rows": [{"lesson": "01_loss_masking", "seconds": 9.0, "failures": 1}]}
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence/run_tiny.json").write_text(json.dumps(record))
    monkeypatch.setattr(readme.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match="01_loss_masking"):
        readme.machine_time("tiny")


@pytest.mark.parametrize(("seconds", "text"), [(None, "–"), (38.6, "39 s"), (706.2, "12 min")])
def test_seconds_are_told_as_people_say_them(seconds, text):
    assert readme.spoken(seconds) == text

"""What a run leaves for people and programs: report.md, report.json, curve.png."""

import statistics
from pathlib import Path

from finetune_lab.lab.finetune import runs, verdict
from finetune_lab.lab.finetune.curves import curve
from finetune_lab.lab.finetune.memory import gb
from finetune_lab.lab.finetune.preflight import Preflight
from finetune_lab.lab.finetune.score import asked, reference
from finetune_lab.lab.finetune.score_pairs import MEANING

ASPECTS = ("prompt", "expected", "before", "after")
SAMPLES = 4
SHARES = ("exact_match", "field_f1", "good", "accuracy", "likelier")
UNITS = {"loss": "nats a token", "chosen_logp": "nats an answer", "rejected_logp": "nats an answer"}


def build(
    found: Preflight,
    before: dict,
    after: dict,
    samples: list[dict],
    log: list[dict],
    bill: dict,
    made: dict,
    result: str,
    unchanged: float | None = None,
) -> dict:
    """The report as plain values. before, after: scores; log: the trainer's; bill: seconds, bytes; made: provenance;
    unchanged: share of the answers that are the same before and after."""
    loss = [[row["step"], row["loss"]] for row in log if "loss" in row]
    held_out = [[row["step"], row["eval_loss"]] for row in log if "eval_loss" in row]
    tail = [value for _, value in loss[-min(10, len(loss) // 10 + 1) :]]  # the last tenth, as single steps jump
    return {
        **found.as_dict(),
        "trainer": found.recipe.trainer(),
        "before": before, "after": after, "samples": samples, "result": result, "unchanged": unchanged,
        "loss": loss, "held_out_loss": held_out,
        "rewards": [[row["step"], row["rewards/chosen"], row["rewards/rejected"]] for row in log if "rewards/chosen" in row and "rewards/rejected" in row],
        "final_loss": statistics.mean(tail) if tail else None,
        **bill, **made,
    }  # fmt: skip


def samples(rows: list[dict], before: list[str], after: list[str]) -> list[dict]:
    """Prompt, expected answer and the answers before and after of a few rows; up to two that are still wrong first."""
    found = [
        dict(zip(ASPECTS, (asked(row)[-1]["content"], reference(row), b, a), strict=True))
        for row, b, a in zip(rows, before, after, strict=True)
    ]
    wrong = [s for s in found if s["after"].strip() != s["expected"].strip()][: SAMPLES // 2]
    return wrong + [s for s in found if s not in wrong][: SAMPLES - len(wrong)]


def write(report: dict, folder: Path) -> None:
    """report.json, curve.png and report.md; the page last, as it names the others."""
    runs.write(folder / "report.json", report)
    if report["loss"]:
        curve(report).savefig(folder / "curve.png", dpi=144)
    runs.write(folder / "report.md", page(report, folder))


def figures(scores: dict) -> str:
    """Scores in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {_figure(name, value)}" for name, value in scores.items())


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "none"
    if name in SHARES:
        return f"{100 * value:.1f} %"
    return f"{value:.1f}" if name == "words" else f"{value:.3f} {UNITS.get(name, '')}".rstrip()


def page(report: dict, folder: Path) -> str:
    """The report as Markdown."""
    recipe = report["recipe"]
    out = [
        f"# {report['trainer']}, {recipe['method']} on {recipe['model']}: {recipe['task'] or Path(recipe['data']).name}",
        "",
    ]
    if said := verdict.lines(report):
        out += [*(f"- {line}" for line in said), ""]
    if recipe.get("adapter"):
        out += [f"Start and reference: the adapter in `{recipe['adapter']}`.", ""]
    out += _scores(report) + _moved(report) + _curve(report) + _samples(report)
    out += ["## The bill", "", *_table([["of this run", ""], *_bill(report)]), ""]
    out += _data(report)
    kind = "adapter" if report["result"] == "adapter" else "model"
    use = f"--adapter {folder}" if kind == "adapter" else f"--model {folder / 'model'}"
    out += ["## Use it", "", "```sh", f'finetune-lab generate {use} "your prompt"', "```", ""]
    out += ["## Recipe", "", "```yaml", (folder / "recipe.yaml").read_text(encoding="utf-8").strip(), "```", ""]
    out += ["The same command again makes the same run; `--fresh` puts this one aside first.", ""]
    return "\n".join(out)


def _scores(report: dict) -> list[str]:
    if not report["after"] and report["before"]:
        return ["Scored before training only: " + figures(report["before"]) + ".", ""]
    if not report["after"]:
        return ["Nothing was held out, so nothing was scored: add `hold_out: 0.1`, or `valid: FILE`.", ""]
    rows = [["held out", "before", "after"]]
    for name, value in report["after"].items():
        rows.append([name.replace("_", " "), _figure(name, report["before"].get(name)), _figure(name, value)])
    out = [*_table(rows), "", f"{report['scored_rows']} held-out rows; {_said(report)} answers.", ""]
    meaning = [f"- {name.replace('_', ' ')}: {text}" for name, text in MEANING.items() if name in report["after"]]
    return [*out, *meaning, ""] if meaning else out


def _said(report: dict) -> str:
    return "sampled (temperature 1)" if report["recipe"]["task"] == "reply" else "greedy"


def _moved(report: dict) -> list[str]:
    """Likelihood displacement: the better answers, too, became less likely."""
    before, after = (report[when].get("chosen_logp") for when in ("before", "after"))
    if before is None or after is None or after >= before:
        return []
    text = (
        f"The chosen answers became less likely ({before:.1f} to {after:.1f} nats an answer), as often in DPO: the loss "
        "asks only that the rejected ones fall further. What the model says now stands below; a larger beta, a lower lr "
        "or fewer steps move it less."
    )
    return [text, ""]


def _curve(report: dict) -> list[str]:
    if not report["loss"]:
        return []
    first, last = report["loss"][0][1], report["final_loss"]
    alt = f"Training loss goes from {first:.3g} to {last:.3g} in {report['loss'][-1][0]} steps."
    if report["held_out_loss"]:
        alt += f" Held-out loss ends at {report['held_out_loss'][-1][1]:.3g}."
    if report["rewards"]:
        _, chosen, rejected = report["rewards"][-1]
        alt += f" Rewards end at {chosen:.2g} for the chosen and {rejected:.2g} for the rejected answers."
    return [f"![{alt}](curve.png)", ""]


def _samples(report: dict) -> list[str]:
    if not report["samples"]:
        return []
    out = ["## Samples", ""]
    for sample in report["samples"]:
        block = [f"{name + ':':10}" + sample[name].replace("\n", "\n" + 10 * " ") for name in ASPECTS]
        out += [*_quoted("\n".join(block)), ""]
    wrong = sum(sample["after"].strip() != sample["expected"].strip() for sample in report["samples"])
    if report["after"].get("exact_match", 1.0) < 1.0 and wrong:
        out += ["Up to two answers that differ from the expected one stand first.", ""]
    return out


def _bill(report: dict) -> list[list[str]]:
    seconds, recipe = report["seconds"], report["recipe"]
    batch = recipe["batch_size"] * recipe["accumulation"] * report["processes"]
    estimate = f" (estimated {gb(report['memory']['bytes'])} beside the libraries)" if report["memory"] else ""
    git = report["git"]
    state = f"{git['commit'][:10]}{' with changes' if git['changed'] else ''}" if git else "no repository"
    unit = "pairs" if "rejected_logp" in report["after"] and recipe["loss"] != "kto" else "sequences"
    return [
        ["training", f"{seconds:.0f} s, {report['total_steps']} steps of {batch} {unit}"],
        ["trained parameters", f"{report['trained_parameters']:,} of {report['parameters']:,}"],
        ["peak memory of the process", gb(report["peak_bytes"]) + estimate],
        ["processes", str(report["processes"])],
        ["seed", str(report["seed"])],
        ["machine", f"{report['machine']['cpu']}, {report['machine']['cores']} cores, {report['machine']['system']}"],
        ["versions", ", ".join(f"{k} {v}" for k, v in report["versions"].items())],
        ["git", state],
        ["date", report["date"]],
    ]


def _data(report: dict) -> list[str]:
    data = report["data"]
    size = f"{data['rows']} rows ({report['kind']}), {data['tokens']:,} tokens"
    lengths = f"median {data['median']:g}, longest {data['longest']}"
    share = f"{data['labelled_share']:.0%} of the tokens count in the loss"
    out = ["## Data", "", f"{size}, {lengths}; {share}.", ""]
    out += [f"- {note}" for note in report["notes"]]
    out += [f"- **{f['level']}, {f['name']}**: {f['found']} {f['fix']}" for f in report["findings"]]
    if report["notes"] or report["findings"]:
        out.append("")
    out += [
        "One example; what counts in the loss stands between `[[` and `]]`:",
        "",
        *_quoted(report["previews"][0]),
        "",
    ]
    return out


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]


def _quoted(text: str) -> list[str]:
    """A text of the data as a code block that nothing in it can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, text or "(nothing)", fence]

"""Every formula of the sheet is evaluated: by its example, against the package, or by a test of its name here."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune_lab import cli
from finetune_lab.course import sheet, topics
from finetune_lab.errors import UserError
from finetune_lab.methods import forgetting, loss, merging, packing

FORMULAS = sheet.load()
EXAMPLES = [formula for formula in FORMULAS if formula.example]


# ---- the examples ----


@pytest.mark.parametrize("formula", EXAMPLES, ids=lambda formula: formula.id)
def test_the_example_gives_what_it_says(formula):
    assert formula.example.value() == pytest.approx(formula.example.gives, rel=1e-3)


COMPUTED = [formula for formula in EXAMPLES if formula.example.compute]


@pytest.mark.parametrize("formula", COMPUTED, ids=lambda formula: formula.id)
def test_the_package_computes_the_same(formula):
    assert formula.example.computed() == pytest.approx(formula.example.value(), rel=1e-6)


def test_every_formula_is_evaluated_or_says_why_not():
    named = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    open_ = [f.id for f in FORMULAS if not f.example and f.id not in named and not f.untested]
    assert open_ == []
    assert len(FORMULAS) >= 40 and sum(f.untested is not None for f in FORMULAS) <= 2


# ---- formulas on tensors, written out as they stand on the sheet ----


def test_sft_loss():
    logits, labels = torch.randn(1, 5, 7), torch.tensor([[-100, -100, 3, 1, 6]])
    logp = logits.log_softmax(-1)
    written = -sum(logp[0, t - 1, labels[0, t]] for t in (2, 3, 4)) / 3
    assert torch.allclose(loss.sft_loss(logits, labels), written)


def test_packing_mask():
    sample, positions = [0, 0, 1, 1, 1], torch.tensor([[0, 1, 0, 1, 2]])
    written = [[j <= i and sample[i] == sample[j] for j in range(5)] for i in range(5)]
    assert packing.block_diagonal_mask(positions)[0, 0].tolist() == written


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 20, bias=False)

    def forward(self, x):
        return self.layer(x)


def adapted(**settings):
    """A layer in peft with r = 8 and alpha = 12; B filled as after training. Returns (model, layer, A, B, W0)."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(r=8, lora_alpha=12, target_modules=["layer"], **settings))
    layer = model.base_model.model.layer
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert not b.any()
    nn.init.normal_(b)
    return model, layer, a, b, layer.base_layer.weight.detach().clone()


def test_lora():
    model, _, a, b, w = adapted()
    x = torch.randn(5, 48)
    assert torch.allclose(model(x), x @ w.T + 12 / 8 * x @ a.T @ b.T, atol=1e-5)


def test_lora_merge():
    _, layer, a, b, w = adapted()
    merged = (w + 12 / 8 * b @ a).detach()
    layer.merge()
    assert torch.allclose(layer.base_layer.weight, merged, atol=1e-6)


def test_lora_init_std():
    _, _, a, _, _ = adapted()
    assert a.std().item() == pytest.approx(1 / math.sqrt(3 * 48), rel=0.1)
    assert a.abs().max().item() <= 1 / math.sqrt(48)


def test_dora():
    model, _, a, b, w = adapted(use_dora=True)
    x, m = torch.randn(5, 48), w.norm(dim=1)
    changed = w + 12 / 8 * b @ a
    written = (m / changed.norm(dim=1))[:, None] * changed
    assert torch.allclose(model(x), x @ written.T, atol=1e-5)
    wrong = w / m[:, None] + 12 / 8 * b @ a  # the trap: W_0 divided by its norm first
    assert not torch.allclose(model(x), x @ (m[:, None] * wrong / wrong.norm(dim=1, keepdim=True)).T, atol=1e-2)


def test_vera():
    a, b = torch.randn(4, 9), torch.randn(7, 4)
    lambda_d, lambda_b = torch.randn(4), torch.randn(7)
    written = lambda_b.diag() @ b @ lambda_d.diag() @ a
    x = torch.randn(3, 9)
    assert torch.allclose(x @ written.T, lambda_b * F.linear(lambda_d * F.linear(x, a), b), atol=1e-4)
    assert torch.linalg.matrix_rank(written) == 4


def test_loreft():
    torch.manual_seed(0)
    r = torch.linalg.qr(torch.randn(12, 3))[0].T
    w, b, h = torch.randn(3, 12), torch.randn(3), torch.randn(12)
    target = w @ h + b
    assert torch.allclose(r @ (h + r.T @ (target - r @ h)), target, atol=1e-5)
    assert torch.allclose(r @ (h + r.T @ (r @ h - target)), 2 * r @ h - target, atol=1e-5)  # the trap


def nf4_code():
    def levels(n):
        p = torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1]
        return torch.special.ndtri(p) / torch.special.ndtri(p[0])

    return torch.cat([-levels(8), torch.zeros(1, dtype=torch.float64), levels(9)]).sort().values.float()


def test_nf4_levels():
    import bitsandbytes.functional as bnb

    theirs = bnb.get_4bit_type("nf4", device="cpu")
    assert len(theirs) == 16 and torch.allclose(nf4_code(), theirs, atol=5e-5)


def test_blockwise_quantization():
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    w = torch.randn(64, 128)
    blocks = w.view(-1, 64)
    c = blocks.abs().amax(1, keepdim=True)
    code = bnb.get_4bit_type("nf4", device="cpu")
    written = c * code[((blocks / c)[:, :, None] - code).abs().argmin(-1)]
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type="nf4"))
    assert torch.allclose(written.view_as(w), theirs, atol=1e-6)


def test_ties():
    trimmed = torch.tensor([[1.0, -2.0, 0.0], [-0.3, 0.5, 0.0], [-0.3, -1.0, 4.0]])
    written = []
    for column in trimmed.T:
        elected = column.sum().sign()
        agreeing = column[column.sign() == elected]
        written.append(agreeing.mean())
    assert torch.allclose(merging.ties_merge(list(trimmed), 1.0), torch.stack(written))


def test_ewc():
    now, old, fisher = torch.randn(3, 4), torch.randn(3, 4), torch.rand(3, 4)
    written = 5.0 / 2 * (fisher * (now - old) ** 2).sum()
    assert torch.allclose(forgetting.ewc_penalty({"w": now}, {"w": old}, {"w": fisher}, 5.0), written)


def test_distillation():
    """Why the factor T squared stands there: with it the gradient does not shrink as the temperature rises."""
    torch.manual_seed(0)
    teacher, start = torch.randn(4, 9), torch.randn(4, 9)

    def gradient(temperature, factor):
        student = start.clone().requires_grad_()
        kl = F.kl_div(
            (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
        )
        (factor * kl).backward()
        return student.grad.norm().item()

    assert gradient(40, 40**2) == pytest.approx(gradient(20, 20**2), rel=0.05)
    assert gradient(40, 1) < 0.3 * gradient(20, 1)


# ---- the page ----


def test_the_page_holds_every_formula_every_trap_and_the_whole_glossary():
    page = sheet.page()
    for formula in FORMULAS:
        assert f"**{formula.name}**" in page and formula.formula in page
        assert formula.trap is None or formula.trap in page
    assert page.count("\n| ") == len(topics.load()) + 1
    assert "- Example: r = 16, d_in = 4,096, d_out = 1,024 gives 81,920." in page
    assert [int(n) for n in re.findall(r"^## (\d\d)", page, re.MULTILINE)] == sorted(
        {int(f.lesson[:2]) for f in FORMULAS}
    )


def test_the_same_data_gives_the_same_page():
    assert sheet.page() == sheet.page()


def test_the_command_writes_replaces_its_own_and_keeps_other_files(tmp_path, capsys):
    out = tmp_path / "sheet.md"
    assert cli.main(["sheet", "--out", str(out)]) == 0 and cli.main(["sheet", "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8") == sheet.page() and [p.name for p in tmp_path.iterdir()] == ["sheet.md"]
    own = tmp_path / "notes.md"
    own.write_text("mine", encoding="utf-8")
    assert cli.main(["sheet", "--out", str(own)]) == 2 and own.read_text(encoding="utf-8") == "mine"
    assert cli.main(["sheet", "--out", str(tmp_path / "no" / "sheet.md")]) == 2
    assert cli.main(["sheet", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "is left alone" in errors and "cannot write" in errors and "is a folder" in errors


def test_a_broken_file_is_refused_with_id_and_field(tmp_path):
    path = tmp_path / "formulas.yml"
    path.write_text("- {id: a, name: n, formula: f, symbols: {}, topic: nothing, meaning: x}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        sheet.load(path)
    for problem in ("a: source: missing", "a: meaning: no such field", "'nothing' is not in topics.yml"):
        assert problem in str(caught.value)

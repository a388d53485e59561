"""Write liger_preference.json: losses and gradients of Liger's chunked preference losses on one small random case.

Liger-kernel is no dependency (it asks for triton), but its chunked losses are plain torch. To make the file again, in a
throw-away folder, with torch as pinned in constraints.txt:

    pip install --no-deps --target LIGER liger-kernel==0.8.5
    PYTHONPATH=LIGER python tests/parity/make_liger_vectors.py

Targets are already shifted in Liger: the state at t is scored against target t.
"""

import json
from importlib import metadata
from pathlib import Path

import torch

ROWS, SEQ, WIDTH, VOCAB = 4, 6, 5, 11  # two pairs: chosen rows first
PATH = Path(__file__).with_name("liger_preference.json")


def case():
    """States, head, targets (-100 where not counted), and the same of a reference model."""
    g = torch.Generator().manual_seed(0)
    shapes = {"states": (ROWS, SEQ, WIDTH), "weight": (VOCAB, WIDTH)}
    inputs = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    inputs |= {
        f"reference_{name}": inputs[name] + 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()
    }
    inputs["targets"] = torch.randint(VOCAB, (ROWS, SEQ), generator=g)
    for row, start in enumerate((2, 1, 4, 0)):  # answers of unequal length
        inputs["targets"][row, :start] = -100
    return inputs


def numbers(tensor: torch.Tensor) -> list:
    """Nested lists; nine digits give back every fp32."""
    return json.loads(json.dumps(tensor.tolist()), parse_float=lambda text: float(f"{float(text):.9g}"))


def main() -> None:
    from liger_kernel import chunked_loss as liger

    inputs = case()
    reference = {"ref_input": inputs["reference_states"], "ref_weight": inputs["reference_weight"]}
    plain = {"compiled": False}
    thumbs, z0 = torch.tensor([True, False, False, True]), torch.tensor(0.4)
    losses = {
        "dpo": lambda s, w: liger.LigerFusedLinearDPOLoss(beta=0.1, **plain)(w, s, inputs["targets"], **reference),
        "hinge": lambda s, w: liger.LigerFusedLinearDPOLoss(beta=0.1, loss_type="hinge", **plain)(
            w, s, inputs["targets"], **reference
        ),
        "robust": lambda s, w: liger.LigerFusedLinearDPOLoss(
            beta=0.1, loss_type="robust", label_smoothing=0.2, **plain
        )(w, s, inputs["targets"], **reference),
        "cdpo": lambda s, w: liger.LigerFusedLinearCPOLoss(beta=0.1, label_smoothing=0.2, alpha=0.0, **plain)(
            w, s, inputs["targets"]
        ),
        "simpo": lambda s, w: liger.LigerFusedLinearSimPOLoss(beta=2.0, gamma=0.5, compute_nll_loss=False, **plain)(
            w, s, inputs["targets"]
        ),
        "orpo": lambda s, w: liger.LigerFusedLinearORPOLoss(beta=0.1, **plain)(w, s, inputs["targets"]),
        "kto": lambda s, w: liger.LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=True, **plain)(
            s, w, inputs["targets"], preference_labels=thumbs, kl=z0, **reference
        ),
    }
    results = {}
    for name, loss_fn in losses.items():
        states, weight = (inputs[key].clone().requires_grad_() for key in ("states", "weight"))
        loss = loss_fn(states, weight)[0]
        loss.backward()
        results[name] = {"loss": loss.item(), "states": numbers(states.grad), "weight": numbers(weight.grad)}
    versions = {name: metadata.version(name) for name in ("liger-kernel", "torch")}
    written = {"command": "see make_liger_vectors.py", "versions": versions, "thumbs": thumbs.tolist(), "z0": z0.item(),
               "inputs": {key: numbers(value) for key, value in inputs.items()}, "losses": results}  # fmt: skip
    PATH.write_text(json.dumps(written) + "\n")


if __name__ == "__main__":
    main()

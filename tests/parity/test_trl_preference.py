"""Our preference losses against TRL's own code on random log-probabilities: loss, rewards, gradients, to 1e-6.

`_compute_loss` of DPOTrainer and KTOTrainer asks a model for log-probabilities; here the model is a table of them.
"""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from finetune_lab.lab.models import load_tokenizer
from finetune_lab.methods import preference as p

PAIRS, SEQ = 5, 9
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def small():
    config = LlamaConfig(vocab_size=1792, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    return LlamaForCausalLM(config)


def settings(cls, folder, **more):
    return cls(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], activation_checkpointing=False, **more)


@pytest.fixture(scope="module")
def dpo_trainer(tmp_path_factory):
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = settings(DPOConfig, tmp_path_factory.mktemp("dpo"))
    trainer = DPOTrainer(model=small(), ref_model=small(), args=args, train_dataset=rows,
                         processing_class=load_tokenizer("tiny"))  # fmt: skip
    trainer.precompute_ref_logps = True
    return trainer


@pytest.fixture(scope="module")
def kto_trainer(tmp_path_factory):
    rows = Dataset.from_list([{"prompt": f"{i}", "completion": "b", "label": i % 2 == 0} for i in range(4)])
    args = settings(KTOConfig, tmp_path_factory.mktemp("kto"), per_device_train_batch_size=4)
    trainer = KTOTrainer(model=small(), ref_model=small(), args=args, train_dataset=rows,
                         processing_class=load_tokenizer("tiny"))  # fmt: skip
    trainer.precompute_ref_logps = True
    return trainer


def token_logps(seed, rows=2 * PAIRS):
    """Log-probabilities of every token and which of them belong to an answer, (rows, SEQ); answers of unequal length."""
    g = torch.Generator().manual_seed(seed)
    counted = torch.arange(SEQ) >= torch.randint(1, SEQ - 1, (rows, 1), generator=g)
    values = -3 * torch.rand(rows, SEQ, generator=g)
    return (values * counted).requires_grad_(), counted


def table(logps):
    """A 'model' whose answer is known: TRL's fused head returns the log-probability of every token but the first."""
    known = {"log_probs": logps[:, 1:], "entropy": torch.zeros_like(logps), "mean_logits": torch.zeros_like(logps)}
    return lambda **_: SimpleNamespace(**known, is_top1=torch.zeros_like(logps, dtype=torch.bool), aux_loss=None)


def trl_pairs(trainer, logps, counted, reference, loss, beta, epsilon):
    """Loss, rewards and gradient that DPOTrainer computes."""
    trainer.loss_types, trainer.beta, trainer.label_smoothing = [loss], beta, epsilon
    trainer._metrics["train"].clear()
    inputs = {"input_ids": torch.zeros_like(counted, dtype=torch.long), "attention_mask": torch.ones_like(counted),
              "completion_mask": counted.long(), "ref_chosen_logps": reference[0],
              "ref_rejected_logps": reference[1]}  # fmt: skip
    trainer.model.train()
    value = trainer._compute_loss(table(logps), inputs, return_outputs=False)
    logged = trainer._metrics["train"]
    rewards = [logged[f"rewards/{side}"][0] for side in ("chosen", "rejected")]
    return value, rewards, torch.autograd.grad(value, logps)[0]


OURS = {
    "sigmoid": (lambda *logps, beta, epsilon: p.dpo_loss(*logps, beta), False),
    "robust": (lambda *logps, beta, epsilon: p.robust_dpo_loss(*logps, beta, epsilon), False),
    "hinge": (lambda *logps, beta, epsilon: p.hinge_loss(*logps, beta), False),
    "ipo": (lambda *logps, beta, epsilon: p.ipo_loss(*logps, beta), True),
}


@pytest.mark.parametrize("loss", OURS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_pair_losses_rewards_and_gradients_equal_dpo_trainers(dpo_trainer, loss, beta, seed):
    logps, counted = token_logps(seed)
    reference = -10 * torch.rand(2, PAIRS, generator=torch.Generator().manual_seed(seed + 50))
    theirs, their_rewards, their_grad = trl_pairs(dpo_trainer, logps, counted, reference, loss, beta, 0.2)
    formula, average = OURS[loss]
    lengths = counted.sum(1).view(2, -1) if average else 1
    sums = logps.sum(1).view(2, -1)
    ours, *rewards = formula(*(sums / lengths), *(reference / lengths), beta=beta, epsilon=0.2)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    grad = torch.autograd.grad(ours, logps)[0]
    torch.testing.assert_close(grad * counted, their_grad * counted, **CLOSE)
    if not average:  # TRL logs the rewards of IPO from sums
        assert [reward.mean().item() for reward in rewards] == pytest.approx(their_rewards, abs=1e-6, rel=1e-6)


def test_label_smoothing_is_read_by_nobody_in_trls_sigmoid_loss(dpo_trainer):
    """Why there is no cDPO among the losses of DPOTrainer 1.16: the setting is accepted and changes nothing."""
    logps, counted = token_logps(0)
    values = [trl_pairs(dpo_trainer, logps, counted, torch.zeros(2, PAIRS), "sigmoid", 0.1, e)[0] for e in (0.0, 0.3)]
    assert values[0] == values[1]


def test_trl_counts_a_tie_as_wrong_and_we_as_one_half(dpo_trainer):
    logps, counted = token_logps(0)
    logps = logps.detach().round().requires_grad_()  # whole numbers: their sums are exact in any order
    sums = logps.detach().sum(1).view(2, -1)
    trl_pairs(dpo_trainer, logps, counted, sums, "sigmoid", 0.1, 0.0)
    assert dpo_trainer._metrics["train"]["rewards/accuracies"] == [0.0]
    assert p.reward_accuracy(*p.dpo_loss(*sums, *sums, 0.1)[1:]) == 0.5


def cpo(logps, loss, beta, epsilon=0.0, gamma=0.0):
    """TRL's CPO trainer holds the smoothed sigmoid and SimPO; it wants its own attributes and two vectors only."""
    known = SimpleNamespace(alpha=0.0, beta=beta, loss_type=loss, label_smoothing=epsilon, simpo_gamma=gamma,
                            accelerator=SimpleNamespace(device="cpu"))  # fmt: skip
    losses, chosen, rejected = CPOTrainer.cpo_loss(known, *logps)
    return losses.mean(), chosen, rejected


def assert_equal_and_same_gradient(ours, theirs, logps):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    a, b = (torch.autograd.grad(loss[0], logps)[0] for loss in (ours, theirs))
    torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(3))
def test_cdpo_equals_the_smoothed_loss_of_cpo_trainer_on_log_ratios(epsilon, seed):
    ratios = 20 * torch.randn(2, 7, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    zero = torch.zeros(7)
    ours = p.cdpo_loss(*ratios, zero, zero, 0.1, epsilon)
    assert_equal_and_same_gradient(ours, cpo(ratios, "sigmoid", 0.1, epsilon), ratios)


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (10.0, 1.6)])
@pytest.mark.parametrize("seed", range(3))
def test_simpo_equals_cpo_trainers(beta, gamma, seed):
    logps = (-torch.rand(2, 7, generator=torch.Generator().manual_seed(seed))).requires_grad_()
    ours = p.simpo_loss(*logps, beta, gamma)
    assert_equal_and_same_gradient(ours, cpo(logps, "simpo", beta, gamma=gamma), logps)


@pytest.mark.parametrize("seed", range(3))
def test_orpo_equals_orpo_trainers(seed):
    logps = (-4 * torch.rand(2, 7, generator=torch.Generator().manual_seed(seed)) - 1e-3).requires_grad_()
    known = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    losses, chosen, rejected, *_ = ORPOTrainer.odds_ratio_loss(known, *logps)
    ours = p.orpo_loss(*logps, torch.tensor(1.25), 0.1)
    assert_equal_and_same_gradient(ours, (1.25 - losses.mean(), chosen, rejected), logps)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 1.5)])
@pytest.mark.parametrize("drift", [2.0, -2.0], ids=["moved away", "clamped at 0"])
@pytest.mark.parametrize("seed", range(2))
def test_kto_its_reference_point_and_its_gradient_equal_kto_trainers(kto_trainer, weights, drift, seed):
    rows = 6
    g = torch.Generator().manual_seed(seed)
    logps, counted = token_logps(seed, rows)
    mismatched, _ = token_logps(seed + 9, rows)
    thumbs = torch.tensor([True, False, True, True, False, True])
    reference = -10 * torch.rand(rows, generator=g)
    mismatched_reference = mismatched.detach().sum(1) - drift
    kto_trainer.beta, (kto_trainer.desirable_weight, kto_trainer.undesirable_weight) = 0.1, weights
    kto_trainer._metrics["train"].clear()
    ids = torch.zeros(rows, SEQ, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": counted.long(), "label": thumbs,
             "KL_input_ids": ids + 1, "KL_attention_mask": ids + 1, "KL_completion_mask": counted.long(),
             "ref_logps": reference, "ref_KL_logps": mismatched_reference}  # fmt: skip

    def model(input_ids, **inputs):
        return table(mismatched if input_ids[0, 0] == 1 else logps)()

    kto_trainer.model.train()
    theirs = kto_trainer._compute_loss(model, batch, return_outputs=False)
    z0 = p.kto_reference_point(mismatched.sum(1), mismatched_reference)
    ours, rewards = p.kto_loss(logps.sum(1), reference, thumbs, z0, 0.1, *weights)
    assert z0.item() == pytest.approx(max(drift, 0.0), abs=1e-5)
    assert kto_trainer._metrics["train"]["kl"] == pytest.approx([z0.item()], abs=1e-6)
    assert kto_trainer._metrics["train"]["rewards/chosen"] == pytest.approx([rewards[thumbs].mean().item()], abs=1e-6)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    a, b = (torch.autograd.grad(loss, logps)[0] * counted for loss in (ours, theirs))
    torch.testing.assert_close(a, b, **CLOSE)

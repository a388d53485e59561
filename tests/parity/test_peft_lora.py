"""Our LoRA and rsLoRA against peft, same weights: output, every gradient, twenty steps, merging, LoRA+."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft_pairs import base_layer, pair, their_parameters, twenty_steps, worst
from torch import nn

from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.inject import active_layers, add_weighted, inject, set_adapter
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.lora_fused import FusedLoRALinear
from finetune_lab.methods.trainable import loraplus_groups

LORA = [LoRALinear, FusedLoRALinear]
each_lora = pytest.mark.parametrize("kind", LORA, ids=lambda kind: kind.__name__)
SHAPES = [(24, 40), (40, 24), (33, 7)]


@each_lora
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_output_and_all_gradients_equal_pefts(kind, shape, bias, rslora):
    assert worst(kind, base_layer(shape, bias), rslora=rslora) < 1e-6


@each_lora
@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_seeded_dropout_draws_pefts_masks(kind, dropout):
    assert worst(kind, base_layer(), dropout=dropout) < 1e-6


@each_lora
def test_conv1d_equals_pefts_fan_in_fan_out(kind):
    assert worst(kind, base_layer(conv=True)) < 1e-6


def test_plain_lora_in_bf16_is_pefts_bit_for_bit():
    assert worst(LoRALinear, base_layer(dtype=torch.bfloat16), dtype=torch.bfloat16) == 0


def test_fused_lora_in_bf16_differs_from_peft_by_one_per_cent_at_most():
    """Measured 0.41 % in the worst tensor: products with A and B run in bf16, peft casts x to fp32."""
    for seed in range(3):
        base = base_layer((96, 160), dtype=torch.bfloat16, seed=seed)
        assert worst(FusedLoRALinear, base, dtype=torch.bfloat16) < 0.01


@each_lora
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_twenty_steps_of_adamw_end_at_pefts_weights(kind, dropout):
    theirs, ours, _ = pair(kind, base_layer(), dropout=dropout)
    wanted = their_parameters(theirs)
    a = twenty_steps(theirs.train(), wanted)
    b = twenty_steps(ours.train(), {name: getattr(ours, name) for name in wanted})
    for name in a:
        assert (a[name] - b[name]).norm() < 1e-6 * a[name].norm(), name


@each_lora
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_the_merged_weight_equals_pefts(kind, rslora, conv):
    theirs, ours, _ = pair(kind, base_layer(conv=conv), rslora=rslora)
    torch.testing.assert_close(theirs.get_delta_weight("default"), ours.delta().T if conv else ours.delta())
    merged = ours.adapted_weight().detach()
    theirs.merge()
    by_peft = theirs.base_layer.weight.T if conv else theirs.base_layer.weight
    assert (merged - by_peft).norm() < 1e-6 * by_peft.norm()


def test_unmerging_bf16_in_peft_leaves_an_error_and_ours_leaves_none():
    theirs, ours, _ = pair(LoRALinear, base_layer((96, 160), dtype=torch.bfloat16))
    original = ours.base.weight.clone()
    theirs.merge()
    theirs.unmerge()
    drift = (theirs.base_layer.weight - original).float().norm() / original.float().norm()
    with torch.no_grad():
        ours.base.weight.copy_(original)
    ours.merge()
    ours.unmerge()
    assert 1e-4 < drift < 1e-2 and torch.equal(ours.base.weight, original)


def two_layer_models(ranks=(2, 4)):
    """The same little network twice: with two peft adapters, and with two of ours of the same values."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 6))
    ours = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 6))
    ours.load_state_dict(net.state_dict())
    theirs = get_peft_model(net, LoraConfig(r=ranks[0], lora_alpha=6, target_modules=["0", "2"]), adapter_name="one")
    theirs.add_adapter("two", LoraConfig(r=ranks[1], lora_alpha=4, target_modules=["0", "2"]))
    for name, r, alpha in (("one", ranks[0], 6), ("two", ranks[1], 4)):
        inject(ours, ["0", "2"], r=r, alpha=alpha, adapter=name)
        with torch.no_grad():
            for path, layer in active_layers(ours).items():
                layer.B.normal_()
                peer = theirs.base_model.model.get_submodule(path)
                peer.lora_A[name].weight.copy_(layer.A)
                peer.lora_B[name].weight.copy_(layer.B)
    return theirs, ours


def test_switching_between_two_adapters_gives_pefts_outputs():
    theirs, ours = two_layer_models()
    x = torch.randn(5, 10)
    for name in ("one", "two", "one"):
        theirs.set_adapter(name)
        set_adapter(ours, name)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_weighted_addition_equals_pefts_cat():
    theirs, ours = two_layer_models()
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "cat", combination_type="cat")
    theirs.set_adapter("cat")
    add_weighted(ours, {"one": 0.7, "two": -0.4}, "sum")
    x = torch.randn(5, 10)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_pefts_linear_addition_is_not_the_sum_of_the_updates():
    theirs, ours = two_layer_models(ranks=(4, 4))  # "linear" needs equal ranks
    theirs.add_weighted_adapter(["one", "two"], [0.5, 0.5], "linear", combination_type="linear")
    add_weighted(ours, {"one": 0.5, "two": 0.5}, "sum")
    exact = ours[0].delta()
    assert (theirs.base_model.model[0].get_delta_weight("linear") - exact).norm() > 0.3 * exact.norm()


@pytest.mark.parametrize("dora", [False, True])
def test_loraplus_gives_every_parameter_pefts_learning_rate(dora):
    torch.manual_seed(0)
    net, mine = (nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 6)) for _ in range(2))
    theirs = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], use_dora=dora))
    inject(mine, ["0", "2"], r=2, alpha=6, layer=DoRALinear if dora else LoRALinear)
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )

    def rates(groups):
        return sorted((tuple(p.shape), group["lr"], group["weight_decay"]) for group in groups for p in group["params"])

    assert rates(loraplus_groups(mine, 1e-4, 16, weight_decay=0.1)) == rates(optimizer.param_groups)

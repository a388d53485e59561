"""Adapters in a whole model: what is wrapped, switched, added up, switched off, merged and counted."""

import copy

import pytest
import torch
from torch import nn

from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.inject import (
    active_adapter,
    active_layers,
    adapters,
    add_weighted,
    delete_adapter,
    disabled,
    find_targets,
    inject,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
)
from finetune_lab.methods.lora import LoRALinear
from finetune_lab.methods.trainable import loraplus_groups, trainable_report


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.up = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 8, bias=False)

    def forward(self, x):
        return x + self.up(torch.tanh(self.q_proj(x)[..., :4] + self.v_proj(x)))


class Toy(nn.Module):
    """Two blocks, and a head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Toy()


IDS = torch.arange(10).reshape(2, 5)


def shake(model, seed=0):
    """Stand for training: values of B that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in active_layers(model).values():
            layer.B.copy_(torch.randn(layer.B.shape, generator=generator))
    return model


def test_all_linear_takes_every_linear_layer_but_the_head(model):
    assert find_targets(model, "all-linear") == [
        f"blocks.{n}.{kind}" for n in (0, 1) for kind in ("q_proj", "v_proj", "up")
    ]


def test_names_patterns_and_paths_choose_layers(model):
    assert find_targets(model, ["q_proj", "v_proj"]) == [
        f"blocks.{n}.{kind}" for n in (0, 1) for kind in ("q_proj", "v_proj")
    ]
    assert find_targets(model, r"blocks\.1\..*_proj") == ["blocks.1.q_proj", "blocks.1.v_proj"]
    assert find_targets(model, ["blocks.0.up", "lm_head"]) == ["blocks.0.up", "lm_head"]


@pytest.mark.parametrize("targets", [["k_proj"], ["q_proj", "k_proj"], "k_proj", ["proj"], ["embed"]])
def test_a_name_that_matches_no_linear_layer_is_told_with_those_there_are(model, targets):
    with pytest.raises(ValueError, match="lm_head, q_proj, up, v_proj"):
        inject(model, targets, r=2, alpha=4)
    assert not adapters(model)


def test_injecting_changes_no_output_and_leaves_only_adapters_to_train(model):
    before = model(IDS)
    inject(model, r=2, alpha=4)
    assert torch.equal(model(IDS), before)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"A", "B"}


def test_an_adapter_that_exists_is_not_replaced_in_silence(model):
    inject(model, r=2, alpha=4)
    with pytest.raises(ValueError, match="'default' already"):
        inject(model, r=4, alpha=4)


def test_switching_brings_back_each_adapters_outputs_bit_for_bit(model):
    plain = model(IDS)
    outputs = {}
    for seed, name in enumerate(("one", "two")):
        shake(inject(model, r=2, alpha=4, adapter=name), seed)
        outputs[name] = model(IDS)
    for name in ("one", "two", "one"):
        assert torch.equal(set_adapter(model, name)(IDS), outputs[name])
        assert active_adapter(model) == name
    assert torch.equal(set_adapter(model, None)(IDS), plain) and active_adapter(model) is None


def test_adapters_may_stand_on_different_layers(model):
    shake(inject(model, ["q_proj"], r=2, alpha=4, adapter="one"))
    shake(inject(model, ["up"], r=2, alpha=4, adapter="two"))
    assert set(active_layers(model)) == {"blocks.0.up", "blocks.1.up"}
    set_adapter(model, "one")
    assert set(active_layers(model)) == {"blocks.0.q_proj", "blocks.1.q_proj"}


def test_an_idle_adapter_is_not_trained_and_still_can_be_later(model):
    inject(model, r=2, alpha=4, adapter="one")
    inject(model, r=2, alpha=4, adapter="two")
    idle = adapters(model)["one"]["blocks.0.up"]
    assert all(p is not idle.A for p in model.parameters())
    assert set_adapter(model, "one").get_submodule("blocks.0.up").A.requires_grad


def test_an_adapter_follows_train_and_eval_of_the_model(model):
    inject(model, r=2, alpha=4, dropout=0.5, adapter="one")
    inject(model.eval(), r=2, alpha=4, adapter="two")
    assert not set_adapter(model, "one").get_submodule("blocks.0.up").dropout.training


def test_the_weighted_sum_of_adapters_is_the_weighted_sum_of_their_updates(model):
    shake(inject(model, r=2, alpha=4, adapter="one"), 1)
    shake(inject(model, ["up", "v_proj"], r=3, alpha=9, adapter="two"), 2)
    one, two = (adapters(model)[name] for name in ("one", "two"))
    add_weighted(model, {"one": 0.7, "two": -0.4}, "sum")
    for path, layer in active_layers(model).items():
        exact = 0.7 * one[path].delta() - (0.4 * two[path].delta() if path in two else 0)
        torch.testing.assert_close(layer.delta(), exact, rtol=1e-6, atol=1e-6)


def test_doras_do_not_add_up(model):
    inject(model, r=2, alpha=4, layer=DoRALinear, adapter="one")
    with pytest.raises(ValueError, match="'one' is a DoRA"):
        add_weighted(model, {"one": 1.0}, "sum")


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_disabled_gives_the_base_and_afterwards_the_adapter_even_after_an_error(model, kind):
    base = model(IDS)
    shake(inject(model, r=2, alpha=4, layer=kind))
    adapted = model(IDS)
    with disabled(model):
        assert torch.equal(model(IDS), base)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(model(IDS), adapted) and not torch.equal(adapted, base)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_merge_is_exact_to_rounding_and_unmerge_is_exact(model, kind):
    base = {name: p.clone() for name, p in model.named_parameters()}
    shake(inject(model, r=2, alpha=4, layer=kind))
    adapted = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), adapted, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(IDS), adapted)
    assert all(torch.equal(p, base[name]) for name, p in set_adapter(model, None).named_parameters())


def test_while_merged_nothing_else_is_allowed(model):
    shake(inject(model, r=2, alpha=4))
    merge(model)
    with pytest.raises(ValueError, match="cannot merge again"):
        merge(model)
    with pytest.raises(ValueError, match="cannot switch"):
        set_adapter(model, None)
    with pytest.raises(ValueError, match="cannot disable"), disabled(model):
        pass
    with pytest.raises(ValueError, match="cannot switch"):
        inject(model, r=2, alpha=4, adapter="two")
    unmerge(model)
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge(model)


def test_there_must_be_something_to_merge(model):
    with pytest.raises(ValueError, match="no active adapter"):
        merge(model)


def test_merging_into_a_tied_head_is_refused_because_the_embedding_would_change(model):
    shake(inject(model, ["q_proj", "lm_head"], r=2, alpha=4))
    before = model(IDS)
    with pytest.raises(ValueError, match="lm_head shares its weight with embed.weight"):
        merge(model)
    assert torch.equal(model(IDS), before)
    model.lm_head.base.weight = nn.Parameter(model.lm_head.base.weight.detach().clone())
    torch.testing.assert_close(merge(model)(IDS), before, rtol=1e-5, atol=1e-5)


def test_merge_and_unload_leaves_a_plain_model(model):
    keys = set(model.state_dict())
    shake(inject(model, r=2, alpha=4))
    adapted = model(IDS)
    merge_and_unload(model)
    torch.testing.assert_close(model(IDS), adapted, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == keys and not adapters(model)


def test_deleting_the_active_adapter_leaves_the_plain_model(model):
    plain = model(IDS)
    shake(inject(model, r=2, alpha=4))
    assert torch.equal(delete_adapter(model, "default")(IDS), plain)
    with pytest.raises(ValueError, match="no adapter 'default'; the model has: none"):
        set_adapter(model, "default")


def test_a_copied_model_has_its_own_adapters(model):
    shake(inject(model, r=2, alpha=4, adapter="one"))
    inject(model, r=2, alpha=4, adapter="two")
    twin = copy.deepcopy(model)
    set_adapter(twin, "one")
    assert active_adapter(model) == "two"
    assert twin.get_submodule("blocks.0.up").base is adapters(twin)["two"]["blocks.0.up"].base
    assert twin.get_submodule("blocks.0.up").base is not model.get_submodule("blocks.0.up").base


def test_the_report_counts_r_times_in_plus_out_and_a_tied_weight_once(model):
    inject(model, ["q_proj", "v_proj"], r=2, alpha=4)
    report = trainable_report(model)
    assert report["by_name"] == {"q_proj": 2 * 2 * (8 + 8), "v_proj": 2 * 2 * (8 + 4)}
    assert report["trainable"] == 112 and report["bytes"] == 448
    assert report["total"] == 112 + 11 * 8 + 2 * (72 + 36 + 32)
    assert report["share"] == pytest.approx(112 / report["total"])


def test_loraplus_moves_b_ratio_times_as_far_in_one_step_of_adam(model):
    inject(model, r=2, alpha=4)
    shake(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(loraplus_groups(model, lr=1e-3, ratio=16))
    model(IDS).square().sum().backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs().max() for name, p in model.named_parameters() if name in before}
    for name, distance in moved.items():
        assert float(distance) == pytest.approx(16e-3 if name.endswith("B") else 1e-3, rel=1e-2)

"""Adapter files: ours load in peft, peft's load in ours, and what does not fit is told in one sentence."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from finetune_lab.errors import UserError
from finetune_lab.lab.adapters import CONFIG, WEIGHTS, fingerprint, load_adapter, save_adapter
from finetune_lab.lab.models import load
from finetune_lab.lab.train import sft
from finetune_lab.methods.dora import DoRALinear
from finetune_lab.methods.inject import active_adapter, active_layers, adapters, inject, set_adapter
from finetune_lab.methods.lora import LoRALinear, lora_scaling, rslora_scaling
from finetune_lab.methods.lora_fused import FusedDoRALinear, FusedLoRALinear

IDS = torch.arange(24).reshape(2, 12)
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True},
            "rsdora": {"use_rslora": True, "use_dora": True}}  # fmt: skip
TARGETS = {"all-linear": "all-linear", "names": ["q_proj", "v_proj"], "tied head": ["q_proj", "lm_head"],
           "one path": ["model.layers.1.mlp.up_proj"]}  # fmt: skip
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_target = pytest.mark.parametrize("targets", TARGETS)


def llama(seed=0, hidden=32, layers=2):
    """A small random Llama with a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=61, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ours(model, targets="all-linear", use_rslora=False, use_dora=False, r=4, **kwargs):
    """`model` with an adapter of ours that is away from its start."""
    kind, scale = DoRALinear if use_dora else LoRALinear, rslora_scaling if use_rslora else lora_scaling
    return moved(inject(model, targets, r=r, alpha=6.0, layer=kind, scale=scale, **kwargs))


def peft(model, targets="all-linear", **options):
    """`model` with an adapter of peft's that is away from its start."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, "task_type": "CAUSAL_LM"} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moved(get_peft_model(model, config)).eval()


def moved(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1 + 0.1 * torch.randn_like(p)) if p.ndim == 1 else p.normal_(std=0.2)
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def save_peft(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft tells that it keeps an adapted head's weight
        model.save_pretrained(folder)


@each_variant
@each_target
def test_what_we_save_loads_in_peft_with_the_same_logits(variant, targets, tmp_path):
    model = ours(llama(), TARGETS[targets], **VARIANTS[variant])
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(theirs) - logits(llama())).abs().max() > 0.01


@each_variant
@each_target
def test_what_peft_saves_loads_in_ours_with_the_same_logits(variant, targets, tmp_path):
    theirs = peft(llama(), TARGETS[targets], **VARIANTS[variant])
    save_peft(theirs, tmp_path)
    model = load_adapter(llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(llama())).abs().max() > 0.01


@each_variant
def test_our_own_round_trip_keeps_every_bit(variant, tmp_path):
    model = ours(llama(), **VARIANTS[variant])
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(llama(), tmp_path)), logits(model))


def test_ranks_and_alphas_that_differ_by_layer_go_both_ways(tmp_path):
    theirs = peft(llama(), ["q_proj", "up_proj"], rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"q_proj": 1})
    save_peft(theirs, tmp_path / "theirs")
    model = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-5, atol=1e-5)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=4, n_positions=32)).eval()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_conv1d_layers_go_both_ways(variant, tmp_path):
    model = ours(gpt2(), ["c_attn", "c_fc"], **VARIANTS[variant])
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(gpt2(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    save_peft(theirs, tmp_path / "theirs")
    torch.testing.assert_close(logits(load_adapter(gpt2(), tmp_path / "theirs")), logits(model), rtol=1e-5, atol=1e-5)


def test_the_file_holds_four_bytes_a_trained_number_and_little_else(tmp_path):
    model = ours(llama())
    save_adapter(model, tmp_path)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (tmp_path / WEIGHTS).stat().st_size
    assert 4 * trained < size < 4 * trained + 8_000
    assert sum(t.numel() for t in load_file(tmp_path / WEIGHTS).values()) == trained


def test_an_adapter_is_saved_by_name_and_loaded_beside_others(tmp_path):
    model = ours(llama(), adapter="one")
    one = logits(model)
    ours(model, adapter="two")
    save_adapter(model, tmp_path, "one")
    load_adapter(model, tmp_path, "again")
    assert active_adapter(model) == "again" and list(adapters(model)) == ["one", "two", "again"]
    assert torch.equal(logits(model), one)
    with pytest.raises(UserError, match="'again' already"):
        load_adapter(model, tmp_path, "again")
    assert torch.equal(logits(set_adapter(model, "again")), one)


def test_a_loaded_adapter_can_be_trained_on(tmp_path):
    save_adapter(ours(llama()), tmp_path)
    model = load_adapter(llama(), tmp_path)
    model(IDS, labels=IDS).loss.backward()
    assert all((layer.A.grad != 0).any() for layer in active_layers(model).values())


def test_the_base_may_be_stored_in_bf16(tmp_path):
    save_adapter(ours(llama()), tmp_path)
    model = load_adapter(llama().to(torch.bfloat16), tmp_path)
    assert active_layers(model)["model.layers.0.self_attn.q_proj"].A.dtype == torch.float32


# what does not fit


def refused(model, folder, sentence):
    """The load fails with this sentence and leaves the model as it was."""
    before = logits(model)
    with pytest.raises(UserError, match=sentence) as caught:
        load_adapter(model, folder)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before) and not adapters(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.fixture
def saved(tmp_path):
    save_adapter(ours(llama()), tmp_path)
    return tmp_path


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def test_a_base_with_fewer_layers_is_refused(saved):
    refused(llama(layers=1), saved, r"made for another model: it adapts model\.layers\.1\.")


def test_a_base_of_another_width_is_refused(saved):
    refused(llama(hidden=64), saved, r"lora_B is \(32, 4\), this model's layer needs \(64, 4\)")


def test_another_base_of_the_same_shapes_is_refused_and_peft_takes_it(saved):
    refused(llama(seed=5), saved, "trained on another base: the shapes fit")
    PeftModel.from_pretrained(llama(seed=5), saved)


def test_a_rank_that_is_not_the_files_is_refused(saved):
    edit(saved, r=8)
    refused(llama(), saved, "has rank 4 but adapter_config.json says 8")


def test_a_dora_file_with_a_lora_config_is_refused(tmp_path):
    save_adapter(ours(llama(), use_dora=True), tmp_path)
    edit(tmp_path, use_dora=False)
    refused(llama(), tmp_path, "holds DoRA magnitudes")


def test_a_lora_file_with_a_dora_config_is_refused(saved):
    edit(saved, use_dora=True)
    refused(llama(), saved, "has no lora_magnitude_vector")


def test_a_lost_tensor_is_told(saved):
    tensors = load_file(saved / WEIGHTS)
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, saved / WEIGHTS)
    refused(llama(), saved, r"incomplete: model\.layers\.0\.mlp\.up_proj has no lora_B")


@pytest.mark.parametrize(
    ("targets", "options", "sentence"),
    [
        (["q_proj"], {"bias": "all"}, "trained biases too"),
        (["q_proj"], {"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        (["embed_tokens"], {}, "no part of a LoRA on a linear layer"),
    ],
)
def test_what_these_layers_cannot_do_is_refused(targets, options, sentence, tmp_path):
    save_peft(peft(llama(), targets, **options), tmp_path)
    refused(llama(), tmp_path, sentence)


def test_another_method_of_the_family_is_named(tmp_path):
    get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    refused(llama(), tmp_path, "is a VERA adapter")


@pytest.mark.parametrize("lost", [CONFIG, WEIGHTS])
def test_a_folder_without_the_files_is_no_adapter(saved, lost):
    (saved / lost).unlink()
    refused(llama(), saved, f"it has no {lost}")


def test_a_broken_file_is_told(saved):
    (saved / WEIGHTS).write_bytes(b"not safetensors")
    refused(llama(), saved, "could not be read as an adapter")


def test_pefts_own_copy_of_a_tied_head_must_be_this_models(tmp_path):
    save_peft(peft(llama(), ["lm_head"]), tmp_path)
    refused(llama(seed=5), tmp_path, "brings its own weights of lm_head")


def test_there_must_be_an_adapter_to_save(tmp_path):
    with pytest.raises(UserError, match="no adapter is active"):
        save_adapter(llama(), tmp_path)
    with pytest.raises(UserError, match="no adapter 'two'; the model has: default"):
        save_adapter(ours(llama()), tmp_path, "two")


def test_the_fingerprint_survives_bf16_and_tells_other_weights_apart():
    weight, other = torch.randn(300, 200), torch.randn(300, 200)
    here = torch.tensor(fingerprint(weight))
    assert (here - torch.tensor(fingerprint(weight.bfloat16()))).abs().max() < 0.02
    assert (here - torch.tensor(fingerprint(weight + 0.09 * other))).abs().max() < 0.3  # as coarse as 4 bits
    assert (here - torch.tensor(fingerprint(other))).square().mean().sqrt() > 0.3


def test_a_layer_alone_is_a_model_too(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    twin = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    twin.load_state_dict(net.state_dict())
    save_adapter(ours(net, ["0", "2"]), tmp_path)
    x = torch.randn(4, 6)
    assert torch.equal(load_adapter(twin, tmp_path)(x), net(x))


# training


ITEMS = [{"prompt": [{"role": "user", "content": f"Say {n}."}], "completion": [{"role": "assistant", "content": str(n)}]}
         for n in range(8)]  # fmt: skip


def trained_tiny(targets, kind):
    model, tokenizer = load("tiny")
    inject(model, targets, r=4, alpha=8.0, layer=kind)
    return model, sft(model, tokenizer, ITEMS, steps=6, batch_size=4, lr=2e-3, warmup=1)


@pytest.mark.parametrize("kind", [LoRALinear, FusedLoRALinear, DoRALinear, FusedDoRALinear])
def test_the_courses_training_loop_trains_an_injected_model_and_leaves_its_base(kind):
    base = {name: p.clone() for name, p in load("tiny")[0].named_parameters()}
    model, history = trained_tiny("all-linear", kind)
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert all(torch.equal(p, base[name]) for name, p in set_adapter(model, None).named_parameters())


def test_an_adapted_head_is_trained_though_the_loss_reads_its_weight():
    model, _ = trained_tiny(["lm_head"], LoRALinear)
    assert (active_layers(model)["lm_head"].B != 0).any()

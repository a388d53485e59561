"""Configs are counted as transformers counts them; a bad one gets one clear sentence."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_lab.methods import counts
from finetune_lab.methods.memory import Recipe, from_config
from finetune_lab.methods.memory.architecture import FAMILIES
from finetune_lab.methods.memory.states import targets, tensors

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 50, "num_experts": 4, "num_local_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 40, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
GOOD = {"model_type": "llama"} | SMALL


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_equal_those_of_transformers(family, tied, bias):
    config = SMALL | {"model_type": family, "tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias}
    if family == "mixtral":
        del config["moe_intermediate_size"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert from_config(config).parameters() == sum(p.numel() for p in model.parameters())


def test_the_list_of_tensors_holds_every_parameter():
    for family in FAMILIES:
        architecture = from_config(SMALL | {"model_type": family})
        found = tensors(architecture, Recipe(method="full"))
        assert sum(t.copies * t.numel for t in found) == architecture.parameters()


def test_adapters_agree_with_the_counting_functions_of_the_drills():
    architecture = from_config({**GOOD, "head_dim": 16})
    found = tensors(architecture, Recipe(method="dora", rank=5))
    lora = sum(t.copies * t.numel for t in found if t.name.endswith(("lora_A", "lora_B")))
    magnitudes = sum(t.copies * t.numel for t in found if t.name.endswith("magnitude"))
    assert lora == counts.lora_parameters_all_linear(64, 96, 32, 3, 5)
    assert magnitudes == counts.dora_magnitudes_all_linear(64, 96, 32, 3)


def test_the_text_part_of_a_multimodal_config_is_taken():
    inner = SMALL | {"model_type": "gemma3_text"}
    assert from_config({"model_type": "gemma3", "text_config": inner}).parameters() == from_config(inner).parameters()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers' is 0"),
        ({"vocab_size": "many"}, "'vocab_size' is 'many'"),
        ({"model_type": "mamba"}, "model_type 'mamba' is not known"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"head_dim": None, "hidden_size": 66}, "hidden_size 66 is not a multiple of 4"),
    ],
)
def test_a_bad_config_gets_one_clear_sentence(change, words):
    with pytest.raises(ValueError, match=words) as found:
        from_config(GOOD | change)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": "adam"}, "optimizer 'adam' is not known: give one of sgd"),
        ({"method": "prefix"}, "method 'prefix' is not known"),
        ({"rank": -4}, "rank is -4"),
        ({"batch": 0}, "batch is 0"),
        ({"seq": 1.5}, "seq is 1.5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"labelled": 2}, "labelled is 2"),
        ({"targets": "q_proj"}, "targets is 'q_proj'"),
        ({"ranks": 4}, "4 ranks without sharding"),
        ({"method": "full", "reference": "adapter-off"}, "needs an adapter"),
        ({"objective": "grpo", "completion": 600}, "completion 600 is longer than seq 512"),
        ({"autocast": True}, "give dtype='fp32'"),
    ],
)
def test_a_bad_recipe_gets_one_clear_sentence(change, words):
    with pytest.raises(ValueError, match=words) as found:
        Recipe(**change)
    assert "\n" not in str(found.value)


def test_a_target_that_the_model_does_not_have_is_named():
    with pytest.raises(ValueError, match="'qkv_proj' is not a linear layer of llama: it has q_proj"):
        targets(from_config(GOOD), Recipe(targets=("qkv_proj",)))

"""Claims about the presets: each is the public model, to the last parameter, for transformers and for our own count."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finetune_lab.methods.memory import architecture, presets

# What the hub states beside each model (safetensors metadata); LLaMA-1 from its paper's code; Gemma 3 from 4B on: the
# stated total less the vision tower (416,866,032) and its projector (1,152 times hidden + 1).
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "mistral-7b": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x7b": 46_702_792_704,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472 - 416_866_032 - 1_152 * 2_561,
    "gemma-3-12b": 12_187_325_040 - 416_866_032 - 1_152 * 3_841,
    "gemma-3-27b": 27_432_406_640 - 416_866_032 - 1_152 * 5_377,
    "phi-3-mini": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "phi-4": 14_659_507_200,
}


def test_every_preset_has_a_published_total():
    assert set(presets.PRESETS) == set(PUBLISHED)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_transformers_builds_the_published_number_of_parameters(name):
    config = dict(presets.PRESETS[name])
    config = CONFIG_MAPPING[config.pop("model_type")](pad_token_id=0, **config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_our_count_is_the_published_number(name):
    assert architecture.from_config(presets.PRESETS[name], name).parameters() == PUBLISHED[name]


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("google/gemma-3-1b-it", "gemma-3-1b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("Llama-2-13b-chat-hf", "llama-2-13b"),
        ("llama", None),
    ],
)
def test_a_preset_is_found_by_the_name_that_people_write(said, meant):
    assert presets.find(said) == meant


@pytest.mark.parametrize(
    ("said", "meant"),
    [("rtx 4090", "RTX-4090"), ("NVIDIA H200", "H200"), ("a100 80GB", "A100-80"), ("Tesla T4", "T4"), ("TPU", None)],
)
def test_a_card_is_found_by_the_name_that_people_write(said, meant):
    assert presets.find_gpu(said) == meant


def test_a_card_gives_less_than_its_box_says_and_more_than_nine_tenths():
    sold = {"RTX-3090": 24, "RTX-4090": 24, "T4": 16, "A100-80": 80, "H200": 141}
    for name, gib in sold.items():
        assert 0.9 * gib < presets.GPUS[name] / presets.GIB < gib

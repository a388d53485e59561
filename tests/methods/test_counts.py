"""The counts are those of peft on a real (small, never square) model, of bitsandbytes, of transformers, or of a paper."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune_lab.methods import counts

SHAPE = {"hidden": 64, "intermediate": 96, "kv_width": 32, "layers": 3}
LLAMA3_8B = {"hidden": 4096, "intermediate": 14336, "kv_width": 1024, "layers": 32}
LLAMA2_7B = {"hidden": 4096, "intermediate": 11008, "kv_width": 4096, "layers": 32}
SMOLLM2 = {"hidden": 576, "intermediate": 1536, "kv_width": 192, "layers": 30}


@pytest.fixture
def model():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
    )


def trainable(model, config) -> int:
    from peft import get_peft_model

    return get_peft_model(model, config).get_nb_trainable_parameters()[0]


def test_lora_on_all_linear_layers_counts_as_peft(model):
    from peft import LoraConfig

    assert trainable(model, LoraConfig(r=5, target_modules="all-linear")) == counts.lora_parameters_all_linear(
        **SHAPE, rank=5
    )


def test_lora_on_attention_counts_as_peft(model):
    from peft import LoraConfig

    config = LoraConfig(r=5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    assert trainable(model, config) == counts.lora_parameters_attention(hidden=64, kv_width=32, layers=3, rank=5)


def test_dora_adds_one_magnitude_for_each_output_row(model):
    from peft import LoraConfig

    dora = trainable(model, LoraConfig(r=5, target_modules="all-linear", use_dora=True))
    assert dora - counts.lora_parameters_all_linear(**SHAPE, rank=5) == counts.dora_magnitudes_all_linear(**SHAPE)


def test_vera_counts_as_peft(model):
    from peft import VeraConfig

    config = VeraConfig(
        r=5, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert trainable(model, config) == counts.vera_parameters_all_linear(**SHAPE, rank=5)


def test_prefix_and_prompt_tuning_count_as_peft(model):
    from peft import PrefixTuningConfig, PromptTuningConfig

    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    assert trainable(model, prefix) == counts.prefix_parameters(7, kv_width=32, layers=3)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    assert trainable(model, prompt) == counts.prompt_parameters(7, hidden=64)


def test_ia3_counts_as_peft(model):
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert trainable(model, config) == counts.ia3_parameters(intermediate=96, kv_width=32, layers=3)


def test_lora_xs_and_bottleneck_adapters_count_their_matrices():
    up_and_down = [torch.nn.Linear(1024, 64), torch.nn.Linear(64, 1024)]
    assert counts.bottleneck_adapter_parameters(1024, 64) == sum(p.numel() for m in up_and_down for p in m.parameters())
    assert counts.bottleneck_adapter_parameters(1024, 64) == 132_160
    assert counts.lora_xs_parameters(16, matrices=1) == 256


def test_published_models_give_the_numbers_that_peft_prints():
    assert counts.lora_parameters_all_linear(**LLAMA3_8B, rank=16) == 41_943_040
    assert counts.lora_parameters_all_linear(3072, 8192, 1024, 28, rank=16) == 24_313_856
    assert counts.lora_parameters_all_linear(**SMOLLM2, rank=8) == 2_442_240
    assert counts.lora_parameters_attention(4096, 4096, 32, rank=16) == 16_777_216
    assert counts.lora_parameters_attention(4096, 1024, 32, rank=16) == 13_631_488
    assert counts.dora_magnitudes_all_linear(**LLAMA3_8B) == 1_376_256
    assert counts.dora_magnitudes_all_linear(**LLAMA2_7B) == 1_359_872
    assert counts.prefix_parameters(20, 4096, 32) == 5_242_880
    assert counts.prefix_parameters(20, 1024, 32) == 1_310_720
    assert counts.prompt_parameters(20, 4096) == 81_920
    assert counts.ia3_parameters(11008, 4096, 32) == 614_400


def test_one_matrix_of_lora_against_the_dense_matrix():
    assert counts.lora_parameters(4096, 4096, 16) == 131_072
    assert counts.dense_to_lora_ratio(4096, 4096, 8) == 256
    assert counts.dense_to_lora_ratio(4096, 11008, 8) == 4096 * 11008 / (8 * (4096 + 11008))


def test_galore_keeps_a_projector_on_the_short_side_and_two_small_moments():
    assert counts.galore_moment_elements(2048, 5461, 128) == counts.galore_moment_elements(5461, 2048, 128)
    attention = counts.galore_moment_elements(2048, 2048, 128) * 4
    feed_forward = counts.galore_moment_elements(2048, 5461, 128) * 3
    assert 24 * (attention + feed_forward) == pytest.approx(0.195e9, rel=0.01)


def test_four_regimes_of_a_7b_model():
    totals = [counts.full_fine_tuning_bytes(7e9, regime) / 1e9 for regime in counts.BYTES_PER_PARAMETER]
    assert totals == [56, 84, 112, 126]


def test_an_unknown_regime_is_named():
    with pytest.raises(ValueError, match="'fp8' is not known"):
        counts.full_fine_tuning_bytes(1, "fp8")


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 8), (torch.float32, 16)])
def test_adamw_keeps_two_moments_in_the_parameters_dtype(dtype, expected):
    parameter = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    kept = [parameter, parameter.grad, *(t for t in optimizer.state[parameter].values() if t.numel() > 1)]
    assert sum(t.numel() * t.element_size() for t in kept) == counts.stored_bytes(1000, expected)


def test_zero_at_eight_devices_is_far_from_its_limits():
    total = counts.zero_bytes_per_rank(7e9, 8, 0)
    assert total == counts.full_fine_tuning_bytes(7e9, "mixed precision with fp32 master")
    sharded = [counts.zero_bytes_per_rank(7e9, 8, stage) for stage in (1, 2, 3)]
    assert [round(x / 1e9, 2) for x in sharded] == [38.5, 26.25, 14.0]
    assert [round(total / x, 2) for x in sharded] == [2.91, 4.27, 8.0]


def test_zero_3_sends_one_and_a_half_times_as_much_as_zero_2():
    assert counts.zero_traffic_elements(7e9, 3) / counts.zero_traffic_elements(7e9, 2) == 1.5
    assert counts.zero_traffic_elements(7e9, 2) == counts.zero_traffic_elements(7e9, 0) == 14e9


def orders(p: int, m: int, one_f_one_b: bool) -> list[list[tuple[str, int]]]:
    """What each stage runs, in order: ("F" or "B", micro-batch)."""
    result = []
    for stage in range(p):
        ahead = min(p - stage, m) if one_f_one_b else m
        order = [("F", i) for i in range(ahead)]
        for i in range(m):
            order += [("B", i)] + ([("F", i + ahead)] if i + ahead < m else [])
        result.append(order)
    return result


def simulate(p: int, m: int, one_f_one_b: bool) -> tuple[float, list[int]]:
    """Idle share of the whole step and the peak of live micro-batches on each stage; every operation takes 1."""
    queue, done, free, peak = orders(p, m, one_f_one_b), {}, [0] * p, [0] * p
    live = [0] * p
    while any(queue):
        for stage in range(p):
            if not queue[stage]:
                continue
            kind, i = queue[stage][0]
            waits_for = [("F", i, stage - 1)] if kind == "F" else [("F", i, stage), ("B", i, stage + 1)]
            waits_for = [key for key in waits_for if 0 <= key[2] < p]
            if all(key in done for key in waits_for):
                start = max([free[stage], *(done[key] for key in waits_for)])
                done[kind, i, stage] = free[stage] = start + 1
                queue[stage].pop(0)
                live[stage] += 1 if kind == "F" else -1
                peak[stage] = max(peak[stage], live[stage])
    return 1 - 2 * m * p / (p * max(free)), peak


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 16), (5, 7)])
def test_gpipe_and_1f1b_have_the_same_bubble_and_differ_in_live_activations(p, m):
    gpipe, all_alive = simulate(p, m, one_f_one_b=False)
    alternating, few_alive = simulate(p, m, one_f_one_b=True)
    assert gpipe == pytest.approx(counts.pipeline_bubble(p, m)) == alternating
    assert all_alive == [m] * p
    assert few_alive == [counts.micro_batches_in_flight(p, m, stage) for stage in range(p)]


def test_the_interleaved_bubble_takes_half_the_time_with_two_chunks():
    def idle_over_busy(share):
        return share / (1 - share)

    plain, interleaved = counts.pipeline_bubble(4, 16), counts.pipeline_bubble(4, 16, chunks=2)
    assert idle_over_busy(plain) == pytest.approx(3 / 16) == pytest.approx(2 * idle_over_busy(interleaved))


def test_nf4_takes_the_bits_that_bitsandbytes_takes():
    from bitsandbytes import functional as bnb

    weight = torch.randn(64 * 256, 64)  # whole blocks on both levels
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    stored = codes.numel() + state.absmax.numel() + 4 * state.state2.absmax.numel()
    assert 8 * stored / weight.numel() == counts.nf4_bits_per_parameter(64, 256) == 4.126953125
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    assert 8 * (codes.numel() + 4 * state.absmax.numel()) / weight.numel() == counts.nf4_bits_per_parameter(64) == 4.5


def test_double_quantisation_saves_a_third_of_a_gigabyte_on_7b_and_three_on_65b():
    assert counts.double_quantisation_saving_bytes(6.74e9) / 1e9 == pytest.approx(0.314, abs=0.001)
    assert counts.double_quantisation_saving_bytes(65.2e9) / 1e9 == pytest.approx(3.04, abs=0.01)


def test_llama_3_8b_in_nf4_is_5_7_gb_and_7_8_after_the_upcast():
    assert counts.quantised_model_bytes(6.979e9, 1.051e9, 2) / 1e9 == pytest.approx(5.70, abs=0.01)
    assert counts.quantised_model_bytes(6.979e9, 1.051e9, 4) / 1e9 == pytest.approx(7.80, abs=0.01)
    assert counts.quantised_model_bytes(6.476e9, 0.262e9, 2) / 1e9 == pytest.approx(3.87, abs=0.01)


def test_activations_logits_and_cache_are_the_bytes_of_their_tensors():
    def size(*shape, dtype):
        tensor = torch.empty(*shape, dtype=dtype, device="meta")
        return tensor.numel() * tensor.element_size()

    assert counts.logits_bytes(4, 4096, 128256, 4) == size(4, 4096, 128256, dtype=torch.float32)
    assert counts.layer_input_bytes(2, 256, 576, 30, 4) == size(30, 2, 256, 576, dtype=torch.float32)
    assert counts.kv_cache_bytes(8192, 1024, 32) == size(2, 32, 8192, 1024, dtype=torch.bfloat16)


def test_a_thousand_adapters_do_not_fit_into_fifty_gigabytes():
    adapter = counts.lora_parameters_all_linear(**LLAMA3_8B, rank=16)
    assert counts.stored_bytes(adapter, 2) == pytest.approx(83.9e6, rel=0.001)
    assert counts.adapters_that_fit(50e9, adapter, 2) == 596


def test_lora_needs_two_thirds_of_the_flops():
    assert counts.lora_training_flops(8e9, 1e6) / counts.full_training_flops(8e9, 1e6) == pytest.approx(2 / 3)


def test_steps_and_warm_up_are_those_of_the_trainer():
    from transformers import TrainingArguments

    steps = counts.optimizer_steps(1000, counts.effective_batch(4, 4, 1), 3)
    assert steps == 189
    for share in (0.03, 0.05, 0.1):
        arguments = TrainingArguments(warmup_steps=share, use_cpu=True, report_to=[])
        for n in (63, 189, 489, 1220):
            assert counts.warmup_steps(n, share) == arguments.get_warmup_steps(n), (n, share)
    assert counts.warmup_steps(189, 0.03) == 6


def test_replay_rows_are_a_share_of_the_finished_mix():
    for new, share in ((1900, 0.05), (9500, 0.2), (45000, 0.25)):
        old = counts.replay_rows(new, share)
        assert math.isclose(old / (old + new), share, rel_tol=1e-3)

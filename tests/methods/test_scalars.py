"""The formulas at a point agree with torch, peft and a Monte-Carlo count."""

import math

import pytest
import torch

from finetune_lab.methods import preference, scalars


@pytest.mark.parametrize("margin", [-800.0, -1.0, 0.0, 0.5, 800.0])
def test_pairwise_loss_is_minus_log_sigmoid_and_does_not_overflow(margin):
    expected = -torch.nn.functional.logsigmoid(torch.tensor(margin, dtype=torch.float64)).item()
    assert scalars.pairwise_loss(margin) == pytest.approx(expected, rel=1e-12)


def test_dpo_starts_at_ln_2_for_every_beta_and_can_fall_while_the_chosen_answer_loses():
    assert scalars.dpo_loss(0, 0, 0.1) == scalars.dpo_loss(-3, -3, 5.0) == pytest.approx(math.log(2))
    assert scalars.dpo_loss(-5, -20, 0.1) == pytest.approx(0.2014, abs=1e-4)


def test_simpo_and_kto_at_a_point_are_the_tensor_losses():
    chosen, rejected = torch.tensor([-0.4]), torch.tensor([-0.9])
    expected = preference.simpo_loss(chosen, rejected, 2.5, 0.7)[0].item()
    assert scalars.simpo_loss(-0.4, -0.9, 2.5, 0.7) == pytest.approx(expected, rel=1e-6)
    for good in (True, False):
        loss, _ = preference.kto_loss(torch.tensor([3.0]), torch.zeros(1), torch.tensor([good]), 0.5, 0.2)
        assert scalars.kto_loss(3.0, 0.5, 0.2, good) == pytest.approx(loss.item(), rel=1e-6)


def test_dpos_expected_loss_under_flips_is_least_at_the_noisy_margin():
    def expected(margin, flipped=0.3, beta=0.5):
        return (1 - flipped) * scalars.dpo_loss(margin, 0, beta) + flipped * scalars.dpo_loss(0, margin, beta)

    best = scalars.noisy_margin(0.3, 0.5)
    assert all(expected(best) < expected(best + d) for d in (-0.1, 0.1))


def test_least_kl_is_zero_at_the_start_and_log_of_the_start_at_the_end():
    assert scalars.least_kl(0.4, 0.4) == 0
    assert scalars.least_kl(1.0, 0.4) == pytest.approx(-math.log(0.4))


def test_reward_model_losses_of_the_first_margins():
    assert [round(scalars.pairwise_loss(m), 4) for m in (0, 1, 2)] == [0.6931, 0.3133, 0.1269]


def test_ipo_starts_at_25_and_is_zero_at_its_target():
    assert scalars.ipo_loss(0, 0, 0.1) == pytest.approx(25)
    assert scalars.ipo_loss(3, -2, 0.1) == pytest.approx(0)


@pytest.mark.parametrize(("successes", "group"), [(1, 8), (3, 8), (15, 16)])
def test_grpo_advantage_is_the_standardised_reward(successes, group):
    rewards = torch.tensor([1.0] * successes + [0.0] * (group - successes), dtype=torch.float64)
    expected = ((rewards - rewards.mean()) / rewards.std())[0].item()
    assert scalars.grpo_success_advantage(successes, group) == pytest.approx(expected)
    assert scalars.grpo_success_advantage(1, 8) == pytest.approx(2.4749, abs=1e-4)


def test_grpo_refuses_a_group_without_signal():
    with pytest.raises(ValueError, match="8 successes of 8"):
        scalars.grpo_success_advantage(8, 8)


def test_scalings_are_those_of_peft():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    for rslora, formula in ((False, scalars.lora_scaling), (True, scalars.rslora_scaling)):
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj"], use_rslora=rslora)
        model = get_peft_model(LlamaForCausalLM(config), lora)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.scaling["default"] == formula(32, 16)


def test_neftune_noise_has_norm_alpha_over_root_three():
    bound = scalars.neftune_bound(5, 512, 576)
    noise = torch.empty(512, 576).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))
    assert noise.norm().item() == pytest.approx(5 / math.sqrt(3), rel=0.01)


def test_dare_keeps_the_mean_and_raises_the_noise():
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(200_000, generator=generator) + 1.0
    kept = (torch.rand(delta.shape, generator=generator) >= 0.9) * delta * scalars.dare_rescale(0.9)
    assert kept.mean().item() == pytest.approx(delta.mean().item(), abs=0.05)
    growth = (kept.square().mean() / delta.square().mean()).sqrt().item()
    assert growth == pytest.approx(scalars.dare_noise_factor(0.9), rel=0.03)


def test_dare_refuses_a_percentage():
    with pytest.raises(ValueError, match="drop is 90"):
        scalars.dare_rescale(90)


def test_dare_collisions_are_rare_for_two_models_and_common_for_ten():
    assert [round(scalars.dare_collision(0.9, n), 3) for n in (2, 3, 10)] == [0.01, 0.028, 0.264]


def test_ties_element_is_that_of_peft_with_election_by_total():
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

    for values in ([1.0, -0.3, -0.3], [0.9, 0.3, -0.2, -0.4, -0.3], [-1.0, 0.2, 0.0], [0.5, 0.5]):
        stacked = torch.tensor(values).unsqueeze(1)
        expected = disjoint_merge(stacked, calculate_majority_sign_mask(stacked, method="total"))
        assert scalars.ties_element(values) == pytest.approx(expected.item(), abs=1e-6), values


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.8])
def test_slerp_of_unit_vectors_stays_on_the_sphere_and_reaches_the_angle(cosine):
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([cosine, math.sqrt(1 - cosine**2)])
    t = 0.25
    mixed = scalars.slerp_weight(cosine, t) * first + scalars.slerp_weight(cosine, 1 - t) * second
    assert mixed.norm().item() == pytest.approx(1)
    assert math.acos(mixed @ first) == pytest.approx(t * math.acos(cosine), rel=1e-4)


def test_slerp_of_parallel_vectors_is_linear():
    assert scalars.slerp_weight(1.0, 0.3) == pytest.approx(0.7)


def test_window_mean_is_the_token_mean_of_all_tokens():
    tokens = torch.rand(40, generator=torch.Generator().manual_seed(0))
    parts = [tokens[:4], tokens[4:]]
    window = scalars.window_token_mean([p.mean().item() for p in parts], [len(p) for p in parts])
    assert window == pytest.approx(tokens.mean().item(), rel=1e-5)


def test_half_width_holds_19_of_20_samples():
    generator = torch.Generator().manual_seed(0)
    shares = (torch.rand(4000, 200, generator=generator) < 0.6).float().mean(1)
    inside = (shares - 0.6).abs() <= scalars.accuracy_half_width(0.6, 200)
    assert inside.float().mean().item() == pytest.approx(0.95, abs=0.015)


def test_the_floor_of_random_codes_is_the_entropy_spread_over_the_tokens():
    uniform = torch.full((9000,), 1 / 9000, dtype=torch.float64)
    entropy = torch.distributions.Categorical(uniform).entropy().item()
    assert scalars.random_code_floor(9000, 11) == pytest.approx(entropy / 11, rel=1e-6)
    assert scalars.random_code_floor(9000, 11) == pytest.approx(0.828, abs=0.001)

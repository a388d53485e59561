"""Each row of the troubleshooting table that a CPU can show has a test of its name, which produces the symptom.

Most also apply the row's fix, and the symptom is gone.
"""

import copy
import inspect
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from finetune_lab import cli
from finetune_lab.course import topics, troubleshooting
from finetune_lab.course.drills import detectors, toys
from finetune_lab.errors import UserError
from finetune_lab.lab.meter import held_over_time
from finetune_lab.lab.models import tiny_folder
from finetune_lab.methods import loss, packing, preference
from finetune_lab.methods.memory.tensors import held_bytes

ROWS = troubleshooting.load()
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_folder())


def llama(seed=0, **settings):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3, **settings}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def bug(id, fixed=False):
    """What the detector of a bug drill says about its snippet, or about the repaired one."""
    from finetune_lab.course.drills import judge, schema

    item = next(item for item in schema.load() if item.id == id)
    namespace = {}
    code = judge.repaired(item, item.line, item.fix) if fixed else item.snippet
    exec(compile(code, id, "exec"), namespace)  # noqa: S102 (our own bank)
    return getattr(detectors, item.detector)(namespace)


# ---- the table ----


def test_there_are_twenty_rows_and_every_row_is_shown_or_says_what_it_needs():
    assert len(ROWS) >= 20
    here = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    shown = {row.id for row in ROWS if row.id in here}
    assert len(shown) >= 12
    assert {row.id for row in ROWS if row.needs is None} == shown


def test_the_command_finds_a_row_by_the_text_of_the_error(capsys):
    assert cli.main(["troubleshoot", "element 0 of tensors does not require grad"]) == 0
    out = capsys.readouterr().out
    assert "enable_input_require_grads" in out and "1 row" in out and "lesson 02" in out


def test_the_command_prints_json_and_says_when_nothing_matches(capsys):
    assert cli.main(["troubleshoot", "nan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["count"] >= 2 and found["rows"][0]["id"].startswith("nan-")
    assert cli.main(["troubleshoot", "zebra"]) == 1
    assert "no row matches 'zebra'" in capsys.readouterr().out


def test_a_broken_table_is_refused_with_id_and_field(tmp_path):
    path = tmp_path / "rows.yml"
    path.write_text("- {id: a, symptom: s, cause: 3, test: t, fix: f, topic: nothing, cure: x}\n", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        troubleshooting.load(path)
    for problem in ("a: cause: expected text", "a: cure: no such field", "'nothing' is not in topics.yml"):
        assert problem in str(caught.value)


def test_every_row_points_to_a_lesson():
    titles = {f"{topic.lesson} {topic.title}" for topic in topics.load()}
    assert {row.lesson for row in ROWS} <= titles
    assert all(
        re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+/(issues|pull)/\d+", link) for row in ROWS for link in row.see
    )


# ---- the loss ----


def test_nan_all_masked():
    labels = torch.tensor([[5, 6, -100, -100], [-100] * 4])
    logits = torch.randn(2, 4, 9)
    assert loss.sft_loss(logits[1:], labels[1:]).isnan()
    assert loss.has_labels(labels).tolist() == [True, False]
    assert loss.sft_loss(logits[:1], labels[:1]).isfinite()


def test_nan_fp16_overflow():
    x = torch.full((2, 2), 300.0)
    for dtype, finite in ((torch.float16, False), (torch.bfloat16, True), (torch.float32, True)):
        scores = (x.to(dtype) ** 2).log_softmax(-1)
        assert scores.isfinite().all().item() is finite


def test_loss_logged_as_zero(tmp_path):
    good, empty = ({"input_ids": [1, 2, 3], "labels": labels} for labels in ([1, 2, 3], [-100] * 3))
    logged = {}
    for hidden in (True, False):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, save_strategy="no", max_steps=3,
            per_device_train_batch_size=1, train_sampling_strategy="sequential", logging_nan_inf_filter=hidden,
        )  # fmt: skip
        trainer = Trainer(llama(), args, train_dataset=[good, empty, good])
        trainer.train()
        logged[hidden] = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged[True][1] == 0.0 and min(logged[True][::2]) > 1
    assert math.isnan(logged[False][1])


def test_loss_flat_bf16_weights():
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.ones(3, dtype=dtype)
        for _ in range(1000):
            weight -= 1e-3
        moved[dtype] = 1 - weight[0].item()
    assert moved[torch.bfloat16] == 0 and moved[torch.float32] == pytest.approx(1, abs=1e-3)


def losses_of(rate, model=None, x=None, y=None, steps=60):
    torch.manual_seed(0)
    model = model or toys.Regressor()
    x, y = (torch.randn(64, 6), torch.randn(64, 3)) if x is None else (x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    return [toys.step(F.mse_loss(model(x), y), optimizer) for _ in range(steps)]


def test_learning_rate_too_high():
    wild, calm = losses_of(5.0), losses_of(0.1)
    assert not wild[-1] < wild[0] and calm[-1] < calm[0]


def test_warmup_longer_than_run():
    steps = math.ceil(1000 / 16) * 3

    def highest(warmup):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4)
        schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
        rates = []
        for _ in range(steps):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return max(rates)

    assert steps == 189
    assert highest(500) < 0.4 * 2e-4 and highest(math.ceil(0.03 * steps)) == pytest.approx(2e-4)


def test_one_sample_does_not_fit():
    ids = torch.tensor([[3, 7, 2, 9, 4]])

    def last_loss(frozen):
        model = toys.TinyLM()
        if frozen:
            model.requires_grad_(False)
            model.distance.requires_grad_(True)  # something trains, and it is not what should
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        return [toys.step(model(ids, labels=ids).loss, optimizer) for _ in range(60)][-1]

    assert last_loss(frozen=False) < 0.1 and last_loss(frozen=True) > 1


def test_overfitting():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
    x, held_out = torch.randn(12, 4), torch.randn(200, 4)
    noisy = x[:, :1] + torch.randn(12, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train, test = [], []
    for _ in range(300):
        train.append(toys.step(F.mse_loss(model(x), noisy), optimizer))
        test.append(F.mse_loss(model(held_out), held_out[:, :1]).item())
    best = test.index(min(test))
    assert 0 < best < 299 and train[-1] < train[best] and test[-1] > 1.2 * test[best]


def test_accumulation_differs():
    assert "weighs" in bug("bug-mean-of-means") and bug("bug-mean-of-means", fixed=True) is None


def test_noisy_evaluation():
    model, ids = toys.TinyLM(dropout=0.3), torch.tensor([[3, 7, 2, 9, 4]])

    def twice():
        with torch.no_grad():
            return [model(ids, labels=ids).loss.item() for _ in range(2)]

    first, second = twice()
    assert first != second
    model.eval()
    first, second = twice()
    assert first == second


# ---- labels and templates ----


def loader_labels(rows, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None)
    model = llama(vocab_size=len(tokenizer))
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return next(iter(trainer.get_train_dataloader()))["labels"]


def test_prompt_is_learnt(tokenizer, tmp_path):
    everything = loader_labels([{"messages": TALK}], tokenizer, tmp_path)
    answer = loader_labels([{"prompt": TALK[:1], "completion": TALK[1:]}], tokenizer, tmp_path)
    assert (everything != -100).all()
    said = tokenizer.decode(answer[answer != -100])
    assert said.startswith("yes") and "hi" not in said


def test_no_generation_marks(tokenizer):
    def marked():
        return sum(tokenizer.apply_chat_template(TALK, return_assistant_tokens_mask=True)["assistant_masks"])

    assert marked() > 0
    for word in ("generation", "endgeneration"):
        tokenizer.chat_template = tokenizer.chat_template.replace(f"{{% {word} %}}", "")
    assert marked() == 0


def test_labels_shifted_twice():
    assert "AFTER the next" in bug("bug-labels-shifted-twice")
    assert bug("bug-labels-shifted-twice", fixed=True) is None


def test_never_stops(tokenizer):
    rows = [tokenizer.apply_chat_template(TALK)["input_ids"] for _ in range(3)]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert all(row[-1] == end for row in rows)

    def ends_with_a_label():
        batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": row} for row in rows])
        return (batch["labels"] == end).sum().item()

    assert ends_with_a_label() >= 3
    tokenizer.pad_token = "<|end|>"
    assert ends_with_a_label() == 0


def test_double_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )  # as Llama's tokenizers do
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert tokenizer(rendered)["input_ids"].count(tokenizer.bos_token_id) == 2
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"].count(tokenizer.bos_token_id) == 1


def test_chat_template_not_set(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="Cannot use chat template functions because tokenizer.chat_template is not set"
    ):
        tokenizer.apply_chat_template(TALK)


def test_special_token_in_text(tokenizer):
    end, typed = tokenizer.convert_tokens_to_ids("<|end|>"), "stop<|end|>now"
    assert tokenizer.encode(typed, add_special_tokens=False).count(end) == 1
    assert tokenizer.encode(typed, add_special_tokens=False, split_special_tokens=True).count(end) == 0


def test_batch_encoding(tokenizer):
    encoded = tokenizer.apply_chat_template(TALK, return_tensors="pt")
    with pytest.raises(AttributeError):
        encoded.shape  # noqa: B018
    with pytest.raises(TypeError):
        tokenizer.decode(encoded[0])
    assert encoded["input_ids"].shape[0] == 1 and "yes" in tokenizer.decode(encoded["input_ids"][0])


def test_right_padded_generation():
    model, rows = llama(), [[5, 9, 3], [8, 4, 6, 2, 9, 7, 11]]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = [model.generate(torch.tensor([row]), **settings)[0, len(row) :].tolist() for row in rows]

    def batch(side):
        ids, mask = packing.pad_rows(rows, 0, side)
        return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].tolist()

    assert batch("left") == alone
    assert batch("right")[0] != alone[0] and batch("right")[1] == alone[1]


def test_packing_contamination():
    model, first, second = llama(), torch.tensor([5, 9, 3, 8]), torch.tensor([4, 6, 2])
    ids = torch.cat([first, second])[None]
    positions = torch.cat([torch.arange(4), torch.arange(3)])[None]
    alone = model(second[None]).logits[0]

    def off(**masks):
        return (model(ids, position_ids=positions, use_cache=False, **masks).logits[0, 4:] - alone).abs().max().item()

    assert off() < 1e-4 and off(attention_mask=torch.ones_like(ids)) > 0.1


def test_label_out_of_range():
    model = llama()
    with pytest.raises(IndexError, match="Target 64 is out of bounds"):
        model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 64]]))
    with pytest.raises(IndexError, match="index out of range"):
        model(torch.tensor([[3, 64]]))
    model.resize_token_embeddings(65, mean_resizing=False)
    ids = torch.tensor([[3, 4, 64]])
    assert model(ids, labels=ids).loss.isfinite()


# ---- adapters ----


def with_lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **settings}))


def filled(adapted, seed=0):
    """Give every B values, as training would."""
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return adapted


def test_target_modules_not_found():
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        with_lora(llama(), target_modules=["query_key_value"])
    assert with_lora(llama(), target_modules="all-linear").get_nb_trainable_parameters()[0] > 0


def test_does_not_require_grad():
    layer, frozen_embedding_output = toys.LoRA(nn.Linear(6, 4)), torch.randn(5, 6)

    def backward(reentrant, x):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()

    message = "element 0 of tensors does not require grad"
    with pytest.warns(UserWarning, match="requires_grad"), pytest.raises(RuntimeError, match=message):
        backward(True, frozen_embedding_output)
    backward(False, frozen_embedding_output)
    assert layer.B.grad is not None
    backward(True, frozen_embedding_output.requires_grad_())  # what enable_input_require_grads does


def test_adapter_stays_zero():
    assert "B is still zero" in bug("bug-optimizer-before-adapters")
    assert bug("bug-optimizer-before-adapters", fixed=True) is None
    assert "still zero" in bug("bug-lora-both-zero")


def test_lora_uses_more_memory():
    adapted = with_lora(llama().to(torch.bfloat16))
    dtypes = {("lora" in name, parameter.dtype) for name, parameter in adapted.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    adapters = [p for name, p in adapted.named_parameters() if "lora" in name]
    optimizer = torch.optim.AdamW(adapters)
    for p in adapters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = sum(optimizer.state[p][key].nbytes for p in adapters for key in ("exp_avg", "exp_avg_sq"))
    total = sum(p.nbytes + p.grad.nbytes for p in adapters) + state
    assert total == 16 * sum(p.numel() for p in adapters)


def test_lora_not_faster():
    from torch.utils.flop_counter import FlopCounterMode

    ids = torch.randint(0, 64, (2, 32))

    def operations(model):
        with FlopCounterMode(display=False) as counter:
            model(ids, labels=ids).loss.backward()
        return counter.get_total_flops()

    settings = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    full = operations(llama(**settings))
    adapter = operations(with_lora(llama(**settings), r=4, target_modules="all-linear"))
    assert 0.6 < adapter / full < 0.8


def test_adapter_on_another_base(tmp_path):
    from peft import PeftModel

    right, other = llama(seed=0), llama(seed=1)
    ids = torch.tensor([[3, 4, 5]])
    adapted = filled(with_lora(copy.deepcopy(right)))
    adapted.save_pretrained(tmp_path)
    expected = adapted(ids).logits
    assert torch.allclose(PeftModel.from_pretrained(right, tmp_path)(ids).logits, expected, atol=1e-4)
    silent = PeftModel.from_pretrained(other, tmp_path)(ids).logits  # no error
    assert (silent - expected).abs().max() > 0.1


def test_merge_without_scale():
    assert "merged layer's is" in bug("bug-alpha-forgotten-at-merge")
    assert bug("bug-alpha-forgotten-at-merge", fixed=True) is None


def test_merge_into_four_bits():
    import bitsandbytes.functional as bnb

    torch.manual_seed(0)
    weight, update = torch.randn(128, 64), 0.007 * torch.randn(128, 64)  # an update of 0.7 % of the weight

    def stored(tensor):
        return bnb.dequantize_4bit(*bnb.quantize_4bit(tensor, quant_type="nf4"))

    base = stored(weight)
    lost = (stored(base + update) - base - update).norm() / update.norm()
    kept = ((base + update) - base - update).norm() / update.norm()
    assert lost > 0.9 and kept < 1e-3


def test_combined_adapters_wrong():
    from peft import LoraConfig

    model = with_lora(llama(), r=4)
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    filled(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    mean = 0.5 * layer.get_delta_weight("default") + 0.5 * layer.get_delta_weight("b")

    def error(kind):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], kind, combination_type=kind)
        return ((layer.get_delta_weight(kind) - mean).norm() / mean.norm()).item()

    assert error("cat") < 1e-5 and error("linear") > 0.3


# ---- libraries and dtypes ----


def test_dtype_mismatch():
    head, hidden = nn.Linear(6, 4), torch.randn(2, 6).bfloat16()
    with pytest.raises(RuntimeError, match="same dtype"):
        head(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(hidden).isfinite().all()


def test_removed_arguments(tmp_path):
    from trl import SFTConfig

    for config, name in ((SFTConfig, "max_seq_length"), (TrainingArguments, "warmup_ratio"),
                         (TrainingArguments, "evaluation_strategy")):  # fmt: skip
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            config(output_dir=str(tmp_path), **{name: 0.03})
    assert {"max_length", "warmup_steps", "eval_strategy"} <= set(inspect.signature(SFTConfig).parameters)


def test_removed_collator():
    with pytest.raises(ImportError, match="cannot import name 'DataCollatorForCompletionOnlyLM' from 'trl'"):
        from trl import DataCollatorForCompletionOnlyLM  # noqa: F401


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_bf16_on_cpu(tmp_path):
    from trl import SFTConfig

    with pytest.raises(ValueError, match="Your setup doesn't support bf16/gpu"):
        SFTConfig(output_dir=str(tmp_path))
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)


def test_four_bit_defaults():
    from transformers import BitsAndBytesConfig

    plain = BitsAndBytesConfig(load_in_4bit=True)
    assert plain.bnb_4bit_quant_type == "fp4" and plain.bnb_4bit_compute_dtype == torch.float32
    assert not plain.bnb_4bit_use_double_quant
    spelt = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                               bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    assert (spelt.bnb_4bit_quant_type, spelt.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)


def test_weights_not_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    model, ids = llama(tie_word_embeddings=False), torch.tensor([[3, 4, 5]])
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    save_file({key: value for key, value in whole.items() if key != "lm_head.weight"}, file, {"format": "pt"})
    torch.manual_seed(5)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)  # no error
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    assert (loaded(ids).logits - model(ids).logits).abs().max() > 0.1
    save_file(whole, file, {"format": "pt"})
    assert not LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]


def test_dpo_reference_from_memory(tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])

    def build(**settings):
        model = llama(vocab_size=len(tokenizer))
        return DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **settings)

    with pytest.raises(OSError, match="Repo id must"):
        build()
    assert build(ref_model=llama(vocab_size=len(tokenizer))) is not None


def test_mixture_is_off():
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    parts = [Dataset.from_dict({"source": [name] * n}) for name, n in (("a", 100), ("b", 5000), ("c", 1000))]

    def share_of_a(rows):
        return rows["source"][:].count("a") / len(rows)

    assert share_of_a(concatenate_datasets(parts)) < 0.02
    mixed = interleave_datasets(parts, probabilities=[0.7, 0.2, 0.1], seed=0)
    assert share_of_a(mixed) == pytest.approx(0.7, abs=0.1)


# ---- preferences ----


def test_chosen_reward_falls():
    before, after = torch.zeros(1), (torch.tensor([-5.0]), torch.tensor([-20.0]))
    start = preference.dpo_loss(before, before, before, before, 0.1)[0]
    value, chosen, _ = preference.dpo_loss(*after, before, before, 0.1)
    assert value < start and chosen < 0


def test_dpo_loss_at_log_two():
    model = toys.TinyLM()
    ids = torch.tensor([[3, 7, 2, 9], [3, 7, 8, 8]])

    def losses(reference):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        values = []
        for _ in range(10):
            policy, fixed = (preference.sequence_logps(m(ids).logits, ids) for m in (model, reference))
            values.append(toys.step(preference.dpo_loss(*policy, *fixed.detach(), 0.1)[0], optimizer))
        return values

    assert losses(model) == pytest.approx([math.log(2)] * 10)
    assert losses(copy.deepcopy(model))[-1] < 0.6


def test_grpo_loss_zero():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 0, 0, 0])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    logps = torch.randn(8, requires_grad=True)
    value = -((logps - logps.detach()).exp() * advantages).mean()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and logps.grad.norm() > 0.1


# ---- machines ----


def test_memory_grows_each_step():
    model, ids = llama(), torch.arange(16)[None]
    losses, numbers = [], []

    def steps(keep):
        curves = held_over_time({n: lambda: keep(model(input_ids=ids, labels=ids).loss) for n in ("1", "2", "3")})
        return [curve[-1] for curve in curves.values()]

    leaked = steps(losses.append)
    assert leaked[2] - leaked[1] == leaked[1] - leaked[0] > 16 * 64 * 4
    assert steps(lambda loss: numbers.append(loss.item()))[2] == 0


def test_checkpointing_saves_nothing():
    def peaks(checkpointing, tokens):
        model, kept = llama(num_hidden_layers=3).train(), {}
        if checkpointing:
            model.activation_checkpointing_enable()
        optimizer, ids = torch.optim.AdamW(model.parameters(), lr=0.0), torch.arange(tokens)[None] % 64
        phases = {"forward": lambda: kept.update(loss=model(input_ids=ids, labels=ids).loss),
                  "backward": lambda: kept.pop("loss").backward(), "step": optimizer.step,
                  "zero": optimizer.zero_grad}  # fmt: skip
        tops = {phase: max(curve) for phase, curve in held_over_time(phases).items()}
        return max(tops, key=tops.get), max(tops.values())

    assert peaks(False, 2) == peaks(True, 2) and peaks(True, 2)[0] == "step"  # few tokens: the peak is the optimizer's
    assert peaks(True, 256)[1] < 0.7 * peaks(False, 256)[1]


def test_out_of_memory_in_the_first_step():
    model, ids = llama(), torch.arange(8)[None]
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()
    assert held_bytes(model, optimizer)["optimizer"] == 0
    optimizer.step()
    assert held_bytes(model, optimizer)["optimizer"] >= 8 * sum(p.numel() for p in model.parameters())


def test_slow_long_rows():
    draw = torch.Generator().manual_seed(0)
    rows = [[1] * int(n) for n in torch.empty(64).log_normal_(3, 0.8, generator=draw).clamp(1, 400)]
    share = packing.pad_rows(rows, 0)[1].float().mean().item()
    ids, _, _ = packing.pack(rows, rows)
    assert share < 0.4 and ids.shape[1] == sum(map(len, rows))

"""Our DPO loss against TRL's trainer on one real batch: same model, same reference, same padding."""

import copy

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

from finetune_lab.methods.chat import completion_labels
from finetune_lab.methods.packing import pad_rows
from finetune_lab.methods.preference import dpo_loss, sequence_logps

ROWS = [
    {"prompt": "where is order 4417?", "chosen": "It is on its way.", "rejected": "no"},
    {"prompt": "hi", "chosen": "Hello.", "rejected": "Go away, please, and do not come back here."},
    {"prompt": "the lamp flickers", "chosen": "Sorry. We send a new one.", "rejected": "lamp lamp"},
]


def ours(model, reference, tokenizer, beta):
    logps = []
    for key in ("chosen", "rejected"):
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in ROWS]
        heads = [tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"] for p in prompts]
        whole = [
            tokenizer.apply_chat_template([*p, {"role": "assistant", "content": row[key]}])["input_ids"]
            for p, row in zip(prompts, ROWS, strict=True)
        ]
        labels = [completion_labels(head, ids) for head, ids in zip(heads, whole, strict=True)]
        ids, mask = pad_rows(whole, tokenizer.pad_token_id)
        targets, _ = pad_rows(labels, -100)
        logps += [sequence_logps(m(ids, attention_mask=mask).logits, targets) for m in (model, reference)]
    return dpo_loss(logps[0], logps[2], logps[1], logps[3], beta)[0]


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_loss_equals_trl(tiny_tokenizer, tmp_path, beta):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    reference = LlamaForCausalLM(config).eval()
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.05 * torch.randn_like(p)
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}],
         **{k: [{"role": "assistant", "content": row[k]}] for k in ("chosen", "rejected")}} for row in ROWS
    ]  # fmt: skip
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], beta=beta,
                     per_device_train_batch_size=len(ROWS), gradient_checkpointing=False)  # fmt: skip
    trainer = DPOTrainer(model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows),
                         processing_class=tiny_tokenizer)  # fmt: skip
    policy.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, dict(batch))
        assert ours(policy, reference, tiny_tokenizer, beta).item() == pytest.approx(theirs.item(), abs=2e-6, rel=1e-5)

"""Every call of transformers, trl, peft, bitsandbytes, datasets and accelerate fits the installed signatures."""

from collections import Counter
from pathlib import Path

import library_calls
import pytest

import finetune_lab

ROOT = Path(finetune_lab.__file__).parents[1]
LESSONS = sorted((ROOT / "solutions").glob("*.py"))
PACKAGE = sorted((ROOT / "finetune_lab").rglob("*.py"))


@pytest.mark.parametrize("folder", [LESSONS, PACKAGE], ids=["lessons", "package"])
def test_every_library_call_fits_the_installed_version(folder):
    found = {
        f"{path.relative_to(ROOT)}:{problem.line}": problem.text
        for path in folder
        for problem in library_calls.check(path.read_text(), lesson=folder is LESSONS).problems
    }
    assert not found


def test_calls_of_all_six_libraries_are_seen():
    calls = Counter(call.split(":")[0] for path in [*LESSONS, *PACKAGE] for call in seen(path))
    assert set(calls) >= library_calls.LIBRARIES and calls.total() >= 250


def test_every_trainer_that_a_command_uses_is_among_the_checked_calls():
    trainers = ("run.py", "dpo.py")
    calls = {
        call.split(":")[1] for name in trainers for call in seen(ROOT / "finetune_lab" / "lab" / "finetune" / name)
    }
    assert calls >= {
        "ResumingSFTTrainer",
        "SFTConfig",
        "ResumingDPOTrainer",
        "DPOConfig",
        "ResumingKTOTrainer",
        "KTOConfig",
    }


def seen(path: Path) -> list[str]:
    return library_calls.check(path.read_text()).checked


WRONG = {  # what older notes write -> what the checker says
    "from trl import SFTTrainer\nSFTTrainer(model, tokenizer=t)": "argument 'tokenizer'",
    "import trl\ntrl.SFTConfig(max_seq_length=512)": "argument 'max_seq_length'",
    "from transformers import TrainingArguments as TA\nTA('out', evaluation_strategy='steps')": "'evaluation_strategy'",
    "from trl import DataCollatorForCompletionOnlyLM": "trl has no DataCollatorForCompletionOnlyLM",
    "import transformers.deepspeed": "no module transformers.deepspeed",
    "import trl\ntrl.PPOTrainer(config)": "trl has no PPOTrainer",
    "from peft import LoraConfig\nsettings = dict(r=8, lora_beta=1)\nLoraConfig(**settings)": "argument 'lora_beta'",
    "from transformers import AutoModelForCausalLM as M\nM.from_pretrained('x', load_in_4bit=True)": "'load_in_4bit'",
    "from transformers import BitsAndBytesConfig\nBitsAndBytesConfig(bnb_4bit_quant='nf4')": "'bnb_4bit_quant'",
    "from transformers import LlamaConfig\nLlamaConfig(num_layers=2)": "'num_layers'",
    "from finetune_lab.lab import models\nmodel, t = models.load()\nmodel(input_ids=x, attn_mask=m)": "'attn_mask'",
    "from finetune_lab.lab import models\nmodel, t = models.load()\nmodel.generate(x, max_tokens=9)": "'max_tokens'",
    "from transformers import PreTrainedModel\ndef f(m: PreTrainedModel):\n    m.save_pretrained()": "save_directory",
    "from trl import SFTTrainer\nt = SFTTrainer(model)\nt.fit()": "SFTTrainer has no fit",
    "from trl import DPOTrainer\nt = DPOTrainer(model)\nt.model(input_ids=x, labls=y)": "'labls'",
    "from trl import DPOTrainer, SFTTrainer\n(DPOTrainer if a else SFTTrainer)(m, ref_model=r)": "'ref_model'",
    "from trl import DPOConfig\nDPOConfig(max_prompt_length=64)": "'max_prompt_length'",
    "from trl import KTOConfig\nKTOConfig(loss_type='kto', label_smoothing=0.1)": "'label_smoothing'",
    "from transformers import TrainerCallback\nclass C(TrainerCallback):\n    def on_step(self, a, s, c): 1": "no event",
    "from datasets import Dataset\nDataset.from_list(rows).map(f, batch=8)": "argument 'batch'",
    "import bitsandbytes as bnb\nbnb.nn.Linear4bit(64, 32, qtype='nf4')": "argument 'qtype'",
    "from accelerate import Accelerator\nAccelerator(fp16=True)": "argument 'fp16'",
}


@pytest.mark.parametrize("source", WRONG, ids=lambda source: source.splitlines()[-1].strip())
def test_a_wrong_call_is_caught(source):
    found = list(library_calls.problems(source))
    assert len(found) == 1 and WRONG[source] in found[0]


@pytest.mark.parametrize(
    "source",
    [
        "from trl import SFTConfig\nSFTConfig(use_cpu=True, bf16=False, max_length=512)",
        "from transformers import AutoModelForCausalLM as M\nM.from_pretrained('x', dtype=d, attn_implementation='sdpa')",
        "from transformers import AutoTokenizer as T\nT.from_pretrained('x', padding_side='left', local_files_only=True)",
        "from finetune_lab.lab import models\nmodel, t = models.load()\nmodel.generate(**t('a'), max_new_tokens=9)",
        "from finetune_lab.lab import models\nmodel, t = models.load()\nt.apply_chat_template(m, my_variable=1)",
        "from trl import DPOTrainer\nt = DPOTrainer(model)\nt.model(input_ids=x)\nt.accelerator.prepare(x)\nt.data_collator(y)",
        "from peft import LoraConfig\nsettings = dict(nonsense=1)\ndef f(**settings): return LoraConfig(**settings)",
    ],
    ids=lambda source: source.splitlines()[-1],
)
def test_a_right_call_is_left_alone(source):
    assert list(library_calls.problems(source)) == []


def test_only_a_lesson_may_show_a_broken_call_and_only_where_it_catches_the_error():
    source = "from trl import SFTTrainer\ntry:\n    SFTTrainer('m', packing=True)\nexcept TypeError as error:\n    print(error)"
    assert library_calls.check(source, lesson=True).problems == []
    assert len(library_calls.check(source).problems) == 1
    assert len(library_calls.check(source.replace("TypeError", "ValueError"), lesson=True).problems) == 1

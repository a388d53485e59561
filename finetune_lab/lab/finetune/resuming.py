"""Two repairs of what happens when a trainer loads a checkpoint; with them a resumed run ends as an uninterrupted one.

peft 0.21.2 makes bf16 adapters (QLoRA) fp32, so that the rest would train in another precision; transformers 5.23
trains one step too many when the checkpoint is already the last one.
"""

from pathlib import Path

from transformers import TrainerState
from transformers.utils import logging as transformers_logging


class Resuming:
    """Both repairs, to put before a trainer: `class T(Resuming, SFTTrainer)`."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        before = {name: p.dtype for name, p in self.model.named_parameters() if p.is_floating_point()}
        loud = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()  # it says that the tied head is missing, which is never saved
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        transformers_logging.set_verbosity(loud)
        for name, p in self.model.named_parameters():
            if p.dtype != before.get(name, p.dtype):
                p.data = p.data.to(before[name])

    def train(self, resume_from_checkpoint: str | None = None, **more):
        if resume_from_checkpoint:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(resume_from_checkpoint)
                self.state = state
                return None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

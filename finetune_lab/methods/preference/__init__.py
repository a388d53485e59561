"""Learning from preferences without reinforcement learning: DPO and its family (lesson 06).

    logps     how likely a model finds an answer, with and without full logits
    pairs     losses on pairs: DPO, cDPO, robust DPO, IPO, hinge, SimPO, ORPO; Bradley-Terry
    thumbs    KTO: one answer, one thumb
    rewards   what to watch: implicit rewards, margins, accuracy
    optimum   what all of this aims at: the optimum of reward minus beta times KL, on a finite set of answers
    sharing   one row for prompt, chosen and rejected: the prompt is computed once

Leaves out reward models, PPO and GRPO. In production: `trl.DPOTrainer`, `trl.KTOTrainer`, `trl.experimental.orpo`/`cpo`.
"""

from finetune_lab.methods.preference.logps import IGNORE_INDEX, hidden_logps, sequence_logps, sum_by, target_logps
from finetune_lab.methods.preference.optimum import kl_objective, kl_optimum, total_variation
from finetune_lab.methods.preference.pairs import (
    bradley_terry,
    cdpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from finetune_lab.methods.preference.rewards import implicit_rewards, reward_accuracy, reward_margins
from finetune_lab.methods.preference.sharing import SharedRows, shared_rows
from finetune_lab.methods.preference.thumbs import kto_loss, kto_reference_point

__all__ = [
    "IGNORE_INDEX", "SharedRows", "bradley_terry", "cdpo_loss", "dpo_loss", "hidden_logps", "hinge_loss",
    "implicit_rewards", "ipo_loss", "kl_objective", "kl_optimum", "kto_loss", "kto_reference_point", "orpo_loss",
    "reward_accuracy", "reward_margins", "robust_dpo_loss", "sequence_logps", "shared_rows", "simpo_loss", "sum_by",
    "target_logps", "total_variation",
]  # fmt: skip

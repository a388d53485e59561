"""Merging models without training, tensor by tensor.

`linear` (weighted mean, SLERP, task arithmetic), `ties`, `dare` and `adapters` are the papers' formulas on whole
tensors; `stream.merge_tensor` is the same for checkpoints that do not fit in memory, with mergekit's parameters.
"""

from finetune_lab.methods.merging.adapters import Adapter, concatenate, factorize, linear_factors, svd, update
from finetune_lab.methods.merging.dare import dare, dare_linear, dare_ties
from finetune_lab.methods.merging.linear import apply, linear, slerp, task_arithmetic, task_vector
from finetune_lab.methods.merging.stream import merge_tensor
from finetune_lab.methods.merging.ties import disjoint_mean, elect_sign, sign_conflicts, ties, ties_merge, trim

__all__ = [
    "Adapter",
    "apply",
    "concatenate",
    "dare",
    "dare_linear",
    "dare_ties",
    "disjoint_mean",
    "elect_sign",
    "factorize",
    "linear",
    "linear_factors",
    "merge_tensor",
    "sign_conflicts",
    "slerp",
    "svd",
    "task_arithmetic",
    "task_vector",
    "ties",
    "ties_merge",
    "trim",
    "update",
]

"""Merge model folders by a recipe, tensor by tensor: what stands behind `finetune-lab merge`.

`config` and `parameters` read the recipe, `checkpoint` the models, `layout` and `checks` say what will be written and
refuse what cannot be, `run` and `write` do it, `card` tells people. The arithmetic is `methods.merging.merge_tensor`.
"""

from finetune_lab.lab.merging.layout import Plan
from finetune_lab.lab.merging.run import carry_out, describe, merge, plan

__all__ = ["Plan", "carry_out", "describe", "merge", "plan"]

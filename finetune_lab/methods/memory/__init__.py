"""How many bytes a fine-tuning run needs, line by line, and at which moment: the estimator of lesson 02.

estimate(from_config(config), Recipe(method="lora", seq=2048)) -> Ledger. Leaves out what `recipe.py` says.
"""

from finetune_lab.methods.memory.architecture import Architecture, Linear, from_config
from finetune_lab.methods.memory.estimate import estimate
from finetune_lab.methods.memory.ledger import CATEGORIES, Ledger, Line
from finetune_lab.methods.memory.recipe import Recipe

__all__ = ["CATEGORIES", "Architecture", "Ledger", "Line", "Linear", "Recipe", "estimate", "from_config"]

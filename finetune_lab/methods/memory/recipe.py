"""A training recipe: everything beside the model that decides how many bytes a run needs, checked when it is made.

Defaults are what people meet: peft's LoRA of rank 16 on all linear layers of a bf16 base, its adapters in fp32
(`autocast_adapter_dtype=True`), AdamW, one sequence of 512 tokens, sdpa attention, no checkpointing.
Leaves out: tensor, pipeline and expert parallelism, activation offloading, torch.compile.
"""

from dataclasses import dataclass, fields

METHODS = ("full", "lora", "dora", "qlora", "qdora", "lora-int8")
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
OPTIMIZERS = (
    "sgd",
    "sgd-momentum",
    "adamw",
    "paged-adamw",
    "adamw-8bit",
    "paged-adamw-8bit",
    "adafactor",
    "galore-adamw",
)
CHOICES = {
    "method": METHODS,
    "dtype": tuple(DTYPES),
    "adapter_dtype": tuple(DTYPES),
    "optimizer_dtype": (None, *DTYPES),
    "optimizer": OPTIMIZERS,
    "update": ("fused", "foreach", "loop"),
    "attention": ("sdpa", "eager", "flash"),
    "logits": ("full", "labelled", "chunked"),
    "objective": ("sft", "dpo", "reward", "ppo", "grpo"),
    "reference": ("none", "separate", "adapter-off", "precomputed"),
    "sharding": ("none", "ddp", "zero1", "zero2", "zero3", "fsdp"),
    "offload": ("none", "optimizer", "all"),
}
AT_LEAST = {"rank": 1, "batch": 1, "seq": 1, "ranks": 1, "generations": 1, "completion": 1, "quant_block": 1}
AT_LEAST |= {"galore_rank": 1}


@dataclass(frozen=True)
class Recipe:
    """How the model is trained. Raises ValueError, one sentence, for a word or number that makes no sense.

    seq: tokens of one sequence, prompt and answer together; batch: sequences (pairs in DPO and reward modelling) in one
    step of one device. labelled: share of positions that count in the loss.
    """

    method: str = "lora"
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0  # of the adapters
    dtype: str = "bf16"  # stored weights of the base; quantised: of the rest, and of the computation
    adapter_dtype: str = "fp32"
    master_weights: bool = False  # an fp32 copy of 16-bit trained weights, its gradient and states in fp32 too
    autocast: bool = (
        False  # fp32 weights, 16-bit products: activations are counted in fp32, an upper bound (not proved)
    )
    optimizer: str = "adamw"
    optimizer_dtype: str | None = None  # of the states; None: as the parameter (torch.optim.AdamW)
    update: str = (
        "fused"  # transformers.Trainer's default; "foreach": torch's on CUDA; "loop": one tensor after another
    )
    galore_rank: int = 128
    batch: int = 1
    seq: int = 512
    checkpointing: bool = False  # of every layer
    attention: str = "sdpa"
    logits: str = "full"  # at every position; "labelled", "chunked": `methods.loss`, only where `labelled`
    labelled: float = 1.0
    quant_block: int = 64
    double_quant: bool = True
    kbit_fp32: bool = True  # peft's prepare_model_for_kbit_training: what stays unquantised becomes fp32
    objective: str = "sft"
    reference: str = "none"
    generations: int = 8  # GRPO: answers to one prompt
    completion: int = 256  # PPO, GRPO: tokens generated, a part of `seq`
    ranks: int = 1
    sharding: str = "none"
    offload: str = "none"

    def __post_init__(self) -> None:
        for field, allowed in CHOICES.items():
            value = getattr(self, field)
            if value not in allowed:
                names = ", ".join(str(a) for a in allowed if a is not None)
                raise ValueError(f"{field} {value!r} is not known: give one of {names}")
        for field, least in AT_LEAST.items():
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{field} is {value!r}: it must be a whole number of at least {least}")
        for field, top in (("dropout", 1.0), ("labelled", 1.0)):
            value = getattr(self, field)
            if not 0.0 <= value <= top or (field == "dropout" and value == 1.0):
                raise ValueError(f"{field} is {value!r}: it is a share from 0 to 1")
        if self.targets != "all-linear" and (isinstance(self.targets, str) or not self.targets):
            raise ValueError(f"targets is {self.targets!r}: give 'all-linear' or names such as ('q_proj', 'v_proj')")
        if self.autocast and self.dtype != "fp32":
            raise ValueError(f"autocast with dtype {self.dtype!r}: autocast keeps fp32 weights, give dtype='fp32'")
        if self.ranks > 1 and self.sharding == "none":
            raise ValueError(f"{self.ranks} ranks without sharding: say 'ddp' (copies), 'zero1'..'zero3' or 'fsdp'")
        if self.reference == "adapter-off" and self.method == "full":
            raise ValueError("reference 'adapter-off' needs an adapter: full fine-tuning changes the reference itself")
        if self.objective in ("ppo", "grpo") and self.completion > self.seq:
            raise ValueError(f"completion {self.completion} is longer than seq {self.seq}, which includes it")

    @property
    def quantised(self) -> bool:
        """Are the base's linear layers stored in 4 or 8 bits?"""
        return self.method in ("qlora", "qdora", "lora-int8")

    @property
    def int8(self) -> bool:
        """LoRA on bitsandbytes' Linear8bitLt, LLM.int8()."""
        return self.method == "lora-int8"

    @property
    def adapts(self) -> bool:
        return self.method != "full"

    @property
    def dora(self) -> bool:
        return self.method in ("dora", "qdora")


RECIPE_FIELDS = tuple(field.name for field in fields(Recipe))

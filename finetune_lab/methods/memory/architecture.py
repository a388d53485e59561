"""What a model's `config.json` says about its size: linear layers, norms, embeddings, counted to the last parameter.

Families: Llama (also SmolLM2), Mistral, Qwen2 (bias on q, k, v), Qwen3 (norm on each head), Gemma 1-3 (tied, wide heads),
Phi-3 (fused qkv and gate_up), and two mixtures of experts (Mixtral, Qwen3-MoE).
    parameters = V h [+ V h if the head is not tied] + layers (linears + norms + experts) + final norm
Leaves out: vision towers, buffers (the rotary frequencies: bytes). In production: `model.num_parameters()`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear layer: weight (fan_out, fan_in) and, with `bias`, a vector of fan_out."""

    name: str
    fan_in: int
    fan_out: int
    bias: bool = False

    @property
    def weights(self) -> int:
        return self.fan_in * self.fan_out

    def parameters(self) -> int:
        return self.weights + (self.fan_out if self.bias else 0)


@dataclass(frozen=True)
class Family:
    """What the model class of transformers decides and a config does not say; defaults are those of its config class."""

    tied: bool = False  # default of tie_word_embeddings
    kv_heads: int | None = None  # default of num_key_value_heads; None: as many as heads
    head_dim: int | None = None  # default of head_dim; None: hidden / heads
    qkv_bias: bool | None = False  # None: config.attention_bias decides, for o_proj too
    mlp_bias: bool = False  # True: config.mlp_bias decides
    qk_norm: bool = False
    norms: int = 2  # vectors of size hidden in one layer
    fused: bool = False  # qkv_proj and gate_up_proj in one
    gemma: bool = False  # norm with (1 + weight) in fp32, scaled embeddings
    sliding: bool = False  # sliding-window attention can be on


FAMILIES = {
    "llama": Family(qkv_bias=None, mlp_bias=True),
    "mistral": Family(kv_heads=8, sliding=True),
    "qwen2": Family(qkv_bias=True, sliding=True),
    "qwen3": Family(qkv_bias=None, head_dim=128, qk_norm=True, sliding=True),
    "gemma": Family(tied=True, qkv_bias=None, head_dim=256, gemma=True),
    "gemma2": Family(tied=True, qkv_bias=None, head_dim=256, norms=4, gemma=True, sliding=True),
    "gemma3_text": Family(tied=True, qkv_bias=None, head_dim=256, qk_norm=True, norms=4, gemma=True, sliding=True),
    "phi3": Family(fused=True, sliding=True),
    "mixtral": Family(kv_heads=8, sliding=True),
    "qwen3_moe": Family(qkv_bias=None, qk_norm=True, sliding=True),
}


@dataclass(frozen=True)
class Architecture:
    """Sizes of one decoder; `family` is a key of FAMILIES (transformers' model_type). `experts` 0 means a dense model."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    rotary_dim: int = 0  # of each head; less than head_dim where only a part is rotated (Phi-4-mini)
    window: int | None = None  # sliding window in tokens, None: full attention everywhere
    full_attention_layers: int | None = None  # layers that see everything although `window` is set; None: none given
    softcap: bool = False  # attention scores through tanh (Gemma 2): no sdpa kernel does it
    final_softcap: bool = False  # logits through tanh
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    max_positions: int = 0

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def linears(self) -> list[Linear]:
        """The `nn.Linear` layers of one decoder layer: what "all-linear" adapts and bitsandbytes quantises.

        Experts are not among them: transformers 5 keeps them as two stacked parameters (see `expert_parameters`).
        """
        h, q, kv, i = self.hidden, self.query_width, self.kv_width, self.intermediate
        if self.traits.fused:
            found = [Linear("o_proj", q, h), Linear("qkv_proj", h, q + 2 * kv)]  # in the order of the model's class
            return found + [Linear("gate_up_proj", h, 2 * i), Linear("down_proj", i, h)]
        found = [Linear("q_proj", h, q, self.qkv_bias), Linear("k_proj", h, kv, self.qkv_bias)]
        found += [Linear("v_proj", h, kv, self.qkv_bias), Linear("o_proj", q, h, self.output_bias)]
        if not self.experts:
            found += [Linear("gate_proj", h, i, self.mlp_bias), Linear("up_proj", h, i, self.mlp_bias)]
            found += [Linear("down_proj", i, h, self.mlp_bias)]
        return found

    def norm_parameters(self) -> int:
        """Norm weights of one layer: vectors of size hidden and, with qk-norm, two of the size of a head."""
        return self.traits.norms * self.hidden + (2 * self.head_dim if self.traits.qk_norm else 0)

    def expert_parameters(self) -> int:
        """Router (experts, hidden) and experts (gate, up, down) of one layer; 0 for a dense model."""
        return self.experts * (self.hidden + 3 * self.hidden * self.expert_intermediate)

    def layer_parameters(self) -> int:
        return sum(linear.parameters() for linear in self.linears()) + self.norm_parameters() + self.expert_parameters()

    def embedding_parameters(self) -> int:
        """Token embedding (vocab, hidden), and the output head where it has its own weight."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def parameters(self) -> int:
        """All parameters, a tied head once: equal to `sum(p.numel() for p in model.parameters())`."""
        return self.embedding_parameters() + self.layers * self.layer_parameters() + self.hidden


def _positive(config: dict, field: str, default: object = None) -> int:
    value = config.get(field)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"the config has no {field!r}: it needs the size fields of a transformers config.json")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"the config's {field!r} is {value!r}: it must be a whole number of at least 1")
    return value


def from_config(config: dict, name: str = "") -> Architecture:
    """An Architecture from the dict of a transformers `config.json`; of a multimodal one, its text part.

    Raises ValueError (one sentence) for an unknown model_type, a missing or impossible field, heads that do not divide.
    """
    if "text_config" in config:
        return from_config(config["text_config"], name or config.get("_name_or_path", ""))
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not known: the estimator knows {', '.join(FAMILIES)}")
    traits = FAMILIES[family]
    hidden, heads = _positive(config, "hidden_size"), _positive(config, "num_attention_heads")
    kv_heads = _positive(config, "num_key_value_heads", traits.kv_heads or heads)
    if heads % kv_heads:
        raise ValueError(
            f"{heads} attention heads cannot share {kv_heads} key/value heads: the first must be a multiple"
        )
    head_dim = config.get("head_dim") or traits.head_dim
    if head_dim is None:
        if hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not a multiple of {heads} attention heads: correct one, or give head_dim"
            )
        head_dim = hidden // heads
    experts = config.get("num_local_experts", config.get("num_experts")) if family in ("mixtral", "qwen3_moe") else 0
    if family in ("mixtral", "qwen3_moe"):
        experts = _positive({"num_experts": experts}, "num_experts")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rotated = config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) if family == "phi3" else 1.0
    own_bias = bool(config.get("attention_bias", False))
    return Architecture(
        name=name or config.get("_name_or_path", "") or family,
        family=family,
        hidden=hidden,
        layers=_positive(config, "num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_positive(config, "intermediate_size"),
        vocab=_positive(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", traits.tied)),
        qkv_bias=own_bias if traits.qkv_bias is None else traits.qkv_bias,
        output_bias=own_bias and traits.qkv_bias is None,
        mlp_bias=traits.mlp_bias and bool(config.get("mlp_bias", False)),
        rotary_dim=int(head_dim * rotated),
        **_window(config, traits),
        softcap=family == "gemma2" and config.get("attn_logit_softcapping", 50.0) is not None,
        final_softcap=config.get("final_logit_softcapping", 30.0 if family == "gemma2" else None) is not None,
        experts=experts,
        experts_per_token=_positive(config, "num_experts_per_tok") if experts else 0,
        expert_intermediate=_positive(config, "moe_intermediate_size", config.get("intermediate_size"))
        if experts
        else 0,
        max_positions=config.get("max_position_embeddings") or 0,
    )


def _window(config: dict, traits: Family) -> dict:
    """`window` and `full_attention_layers`: who looks back only so far."""
    window = config.get("sliding_window") if traits.sliding and config.get("use_sliding_window", True) else None
    types = config.get("layer_types")
    layers = config.get("num_hidden_layers", 0)
    if window is None:
        return {"window": None, "full_attention_layers": None}
    if types is None and config["model_type"] in ("gemma2", "gemma3_text"):
        every = 2 if config["model_type"] == "gemma2" else config.get("sliding_window_pattern") or 6
        types = ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(layers)]
    full = sum(kind == "full_attention" for kind in types) if types else 0
    return {"window": None if types and full == layers else window, "full_attention_layers": full}

"""Models and graphics cards that people ask about: facts of public configurations, no weights, no network.

`PRESETS[name]` is a dictionary as in the model's config.json, cut down to what decides memory; hand it to
`architecture.from_config`. The text part of a multimodal model counts alone (Gemma 3 from 4B on: without its vision
tower). A test builds each one with transformers on the meta device and compares with the published total.
`GPUS[name]` is the card's memory in bytes as torch reports it (`torch.cuda.get_device_properties(0).total_memory`, the
"total capacity" of an out-of-memory message): less than the box says, because ECC and the driver keep a part. It differs
by a percent with the driver; the lowest common value is given. The CUDA context is not in it: it comes out of it.
Leaves out: everything that does not decide memory (rope's base, activation functions, special tokens). Context lengths are
those of the published configs; instruction-tuned siblings sometimes state another.
"""

GIB = 1024**3


def _config(model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int,
            vocab: int, tied: bool, positions: int, **more) -> dict:  # fmt: skip
    """One config.json, in the words of transformers."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": positions,
        **more,
    }


_QWEN_MOE = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
_WINDOW_512, _WINDOW_1024, _WINDOW_4096 = ({"sliding_window": tokens} for tokens in (512, 1024, 4096))
_PHI_4_MINI = {"sliding_window": 262144, "partial_rotary_factor": 0.75}
_MIXTRAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
# fmt: off
_ROWS = {
    # name                 family      hidden  inner layers heads kv  dim   vocab   tied   positions
    "smollm2-135m":       ("llama",       576,  1536, 30,  9,  3,  64,  49152, True,    8192),
    "smollm2-360m":       ("llama",       960,  2560, 32, 15,  5,  64,  49152, True,    8192),
    "smollm2-1.7b":       ("llama",      2048,  8192, 24, 32, 32,  64,  49152, True,    8192),
    "qwen3-0.6b":         ("qwen3",      1024,  3072, 28, 16,  8, 128, 151936, True,   40960),
    "qwen3-1.7b":         ("qwen3",      2048,  6144, 28, 16,  8, 128, 151936, True,   40960),
    "qwen3-4b":           ("qwen3",      2560,  9728, 36, 32,  8, 128, 151936, True,   40960),
    "qwen3-8b":           ("qwen3",      4096, 12288, 36, 32,  8, 128, 151936, False,  40960),
    "qwen3-14b":          ("qwen3",      5120, 17408, 40, 40,  8, 128, 151936, False,  40960),
    "qwen3-32b":          ("qwen3",      5120, 25600, 64, 64,  8, 128, 151936, False,  40960),
    "qwen3-30b-a3b":      ("qwen3_moe",  2048,  6144, 48, 32,  4, 128, 151936, False,  40960, _QWEN_MOE),
    "qwen2.5-0.5b":       ("qwen2",       896,  4864, 24, 14,  2,  64, 151936, True,   32768),
    "qwen2.5-1.5b":       ("qwen2",      1536,  8960, 28, 12,  2, 128, 151936, True,   32768),
    "qwen2.5-3b":         ("qwen2",      2048, 11008, 36, 16,  2, 128, 151936, True,   32768),
    "qwen2.5-7b":         ("qwen2",      3584, 18944, 28, 28,  4, 128, 152064, False,  32768),
    "qwen2.5-14b":        ("qwen2",      5120, 13824, 48, 40,  8, 128, 152064, False,  32768),
    "qwen2.5-32b":        ("qwen2",      5120, 27648, 64, 40,  8, 128, 152064, False,  32768),
    "qwen2.5-72b":        ("qwen2",      8192, 29568, 80, 64,  8, 128, 152064, False,  32768),
    "llama-3.2-1b":       ("llama",      2048,  8192, 16, 32,  8,  64, 128256, True,  131072),
    "llama-3.2-3b":       ("llama",      3072,  8192, 28, 24,  8, 128, 128256, True,  131072),
    "llama-3.1-8b":       ("llama",      4096, 14336, 32, 32,  8, 128, 128256, False, 131072),
    "llama-3.1-70b":      ("llama",      8192, 28672, 80, 64,  8, 128, 128256, False, 131072),
    "llama-2-7b":         ("llama",      4096, 11008, 32, 32, 32, 128,  32000, False,   4096),
    "llama-2-13b":        ("llama",      5120, 13824, 40, 40, 40, 128,  32000, False,   4096),
    "llama-2-70b":        ("llama",      8192, 28672, 80, 64,  8, 128,  32000, False,   4096),
    "llama-33b":          ("llama",      6656, 17920, 60, 52, 52, 128,  32000, False,   2048),
    "llama-65b":          ("llama",      8192, 22016, 80, 64, 64, 128,  32000, False,   2048),
    "mistral-7b":         ("mistral",    4096, 14336, 32, 32,  8, 128,  32768, False,  32768),
    "mistral-nemo-12b":   ("mistral",    5120, 14336, 40, 32,  8, 128, 131072, False, 131072),
    "mistral-small-24b":  ("mistral",    5120, 32768, 40, 32,  8, 128, 131072, False,  32768),
    "mixtral-8x7b":       ("mixtral",    4096, 14336, 32, 32,  8, 128,  32000, False,  32768, _MIXTRAL),
    "gemma-2-2b":         ("gemma2",     2304,  9216, 26,  8,  4, 256, 256000, True,    8192, _WINDOW_4096),
    "gemma-2-9b":         ("gemma2",     3584, 14336, 42, 16,  8, 256, 256000, True,    8192, _WINDOW_4096),
    "gemma-2-27b":        ("gemma2",     4608, 36864, 46, 32, 16, 128, 256000, True,    8192, _WINDOW_4096),
    "gemma-3-270m":       ("gemma3_text", 640,  2048, 18,  4,  1, 256, 262144, True,   32768, _WINDOW_512),
    "gemma-3-1b":         ("gemma3_text", 1152, 6912, 26,  4,  1, 256, 262144, True,   32768, _WINDOW_512),
    "gemma-3-4b":         ("gemma3_text", 2560, 10240, 34, 8,  4, 256, 262208, True,  131072, _WINDOW_1024),
    "gemma-3-12b":        ("gemma3_text", 3840, 15360, 48, 16, 8, 256, 262208, True,  131072, _WINDOW_1024),
    "gemma-3-27b":        ("gemma3_text", 5376, 21504, 62, 32, 16, 128, 262208, True,  131072, _WINDOW_1024),
    "phi-3-mini":         ("phi3",       3072,  8192, 32, 32, 32,  96,  32064, False,   4096, {"sliding_window": 2047}),
    "phi-4-mini":         ("phi3",       3072,  8192, 32, 24,  8, 128, 200064, True,  131072, _PHI_4_MINI),
    "phi-4":              ("phi3",       5120, 17920, 40, 40, 10, 128, 100352, False,  16384),
}
_GIB_SEEN = {
    "RTX-4060": 7.62, "RTX-3060": 11.62, "RTX-4070": 11.63, "RTX-4080": 15.57, "RTX-5080": 15.47, "RTX-3090": 23.56,
    "RTX-4090": 23.52, "RTX-5090": 31.36, "T4": 14.56, "P100": 15.89, "V100-16": 15.77, "V100-32": 31.73, "L4": 21.95,
    "A10": 21.98, "A40": 44.34, "L40S": 44.39, "A6000": 47.40, "A100-40": 39.38, "A100-80": 79.14, "H100": 79.10,
    "H200": 139.80, "B200": 178.35,
}
# fmt: on
PRESETS: dict[str, dict] = {
    name: _config(*row[:10], **(row[10] if len(row) > 10 else {})) for name, row in _ROWS.items()
}
GPUS: dict[str, int] = {name: int(size * GIB) for name, size in sorted(_GIB_SEEN.items(), key=lambda card: card[1])}
_ENDINGS = ("-instruct", "-it", "-chat", "-base", "-pt", "-hf", "-v0.3")


def find(name: str) -> str | None:
    """The preset that a person means by `Llama-3.1-8B-Instruct` or `Qwen/Qwen3-8B`, else None.

    Letters' case, the owner before the slash and endings such as -Instruct do not decide memory.
    """
    short = name.strip().lower().rsplit("/", 1)[-1]
    while short not in PRESETS and short.endswith(_ENDINGS):
        short = next(short.removesuffix(ending) for ending in _ENDINGS if short.endswith(ending))
    return short if short in PRESETS else None


def find_gpu(name: str) -> str | None:
    """The card that a person means by `rtx 4090`, `NVIDIA H200` or `a100 80GB`, else None. Case and hyphens are free."""
    wanted = _plain(name)
    return next((card for card in GPUS if _plain(card) == wanted), None)


def _plain(name: str) -> str:
    text = "".join(letter for letter in name.lower() if letter.isalnum())
    for word in ("nvidia", "geforce", "tesla", "gb"):
        text = text.replace(word, "")
    return text

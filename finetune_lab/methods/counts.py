"""Counting: parameters, bytes, steps and traffic, each in one line that can be checked by hand.

Papers: LoRA 2106.09685, DoRA 2402.09353, VeRA 2310.11454, LoRA-XS 2405.17604, prefix 2101.00190, prompt 2104.08691,
bottleneck adapter 1902.00751, IA3 2205.05638, GaLore 2403.03507, QLoRA 2305.14314, ZeRO 1910.02054, GPipe 1811.06965.
Leaves out: what a run needs at its peak (one layer's activations, buffers, the allocator), and models whose heads
times head size differ from the hidden size. In production: `PeftModel.get_nb_trainable_parameters`, `accelerate estimate`.
"""

import math

# Bytes for each trained parameter: weights + gradients + optimizer (master copy, both moments), without activations.
BYTES_PER_PARAMETER = {
    "pure bf16": 8,  # 2 + 2 + (2 + 2): torch.optim.AdamW on bf16 parameters
    "bf16 with fp32 moments": 12,  # 2 + 2 + (4 + 4): the count of the QLoRA paper for 16-bit fine-tuning
    "mixed precision with fp32 master": 16,  # 2 + 2 + (4 + 4 + 4): the ZeRO paper, section 3.1; all-fp32 is 4 + 4 + 8
    "fp32 master and fp32 gradients": 18,  # 6 + 4 + 8: fp32 and 16-bit weights, fp32 gradients, fp32 moments
}


def lora_parameters(in_features: int, out_features: int, rank: int) -> int:
    """A (rank, in) and B (out, rank) of one adapted matrix: rank * (in + out)."""
    return rank * (in_features + out_features)


def dense_to_lora_ratio(in_features: int, out_features: int, rank: int) -> float:
    """How many times fewer numbers LoRA trains in this one matrix: in * out / (rank * (in + out))."""
    return in_features * out_features / lora_parameters(in_features, out_features, rank)


def llama_linear_shapes(hidden: int, intermediate: int, kv_width: int) -> list[tuple[int, int]]:
    """(in, out) of q, k, v, o, gate, up, down of one Llama layer; kv_width = key/value heads * head size."""
    return [
        (hidden, hidden),
        (hidden, kv_width),
        (hidden, kv_width),
        (hidden, hidden),
        (hidden, intermediate),
        (hidden, intermediate),
        (intermediate, hidden),
    ]


def lora_parameters_all_linear(hidden: int, intermediate: int, kv_width: int, layers: int, rank: int) -> int:
    """LoRA on all seven linear layers of every layer (peft: target_modules="all-linear")."""
    shapes = llama_linear_shapes(hidden, intermediate, kv_width)
    return layers * sum(lora_parameters(fan_in, fan_out, rank) for fan_in, fan_out in shapes)


def lora_parameters_attention(hidden: int, kv_width: int, layers: int, rank: int) -> int:
    """LoRA on q, k, v and o of every layer."""
    shapes = llama_linear_shapes(hidden, 0, kv_width)[:4]
    return layers * sum(lora_parameters(fan_in, fan_out, rank) for fan_in, fan_out in shapes)


def dora_magnitudes_all_linear(hidden: int, intermediate: int, kv_width: int, layers: int) -> int:
    """What DoRA adds to LoRA: one magnitude for each output row of each adapted matrix (peft: weight norm over dim 1)."""
    return layers * sum(fan_out for _, fan_out in llama_linear_shapes(hidden, intermediate, kv_width))


def vera_parameters_all_linear(hidden: int, intermediate: int, kv_width: int, layers: int, rank: int) -> int:
    """VeRA trains two vectors a matrix, d (rank) and b (out); its random A and B are shared and frozen."""
    return layers * sum(fan_out + rank for _, fan_out in llama_linear_shapes(hidden, intermediate, kv_width))


def lora_xs_parameters(rank: int, matrices: int) -> int:
    """LoRA-XS trains one (rank, rank) matrix between frozen factors of each weight's SVD."""
    return matrices * rank * rank


def prefix_parameters(virtual_tokens: int, kv_width: int, layers: int) -> int:
    """Prefix tuning without the MLP: a key and a value of kv_width for each virtual token and layer."""
    return 2 * virtual_tokens * kv_width * layers


def prompt_parameters(virtual_tokens: int, hidden: int) -> int:
    """Prompt tuning: one trained embedding a virtual token, at the input only."""
    return virtual_tokens * hidden


def bottleneck_adapter_parameters(hidden: int, bottleneck: int, adapters: int = 1) -> int:
    """Houlsby adapters with both biases: 2 * hidden * bottleneck + bottleneck + hidden each."""
    return adapters * (2 * hidden * bottleneck + bottleneck + hidden)


def ia3_parameters(intermediate: int, kv_width: int, layers: int) -> int:
    """IA3 vectors for keys, values and the inner activations of the feed-forward layer."""
    return layers * (2 * kv_width + intermediate)


def galore_moment_elements(rows: int, columns: int, rank: int) -> int:
    """Numbers GaLore stores for one matrix: projector (short side, rank) and two moments (rank, long side)."""
    short, long = sorted((rows, columns))
    return short * rank + 2 * long * rank


def full_fine_tuning_bytes(parameters: float, regime: str) -> float:
    """Weights, gradients and AdamW state in bytes; `regime` is a key of BYTES_PER_PARAMETER.

    Raises ValueError for another regime.
    """
    if regime not in BYTES_PER_PARAMETER:
        raise ValueError(f"regime {regime!r} is not known: give one of {', '.join(BYTES_PER_PARAMETER)}")
    return parameters * BYTES_PER_PARAMETER[regime]


def stored_bytes(elements: float, bytes_per_element: float) -> float:
    """Bytes of so many numbers: weights (2 in bf16), an adapter's file (4 in fp32), its training state (16)."""
    return elements * bytes_per_element


def adapters_that_fit(memory_bytes: float, parameters: int, bytes_per_parameter: int) -> int:
    """Whole adapters that fit into a cache of so many bytes."""
    return int(memory_bytes // (parameters * bytes_per_parameter))


def zero_bytes_per_rank(parameters: float, ranks: int, stage: int) -> float:
    """Model state on each device in bytes, mixed precision (2 weights + 2 gradients + 12 optimizer), ZeRO figure 1.

    Stage 0 shards nothing, 1 the optimizer state, 2 also gradients, 3 also weights. Activations stay as they are.
    """
    weights, gradients, optimizer = 2.0, 2.0, 12.0
    if stage >= 1:
        optimizer /= ranks
    if stage >= 2:
        gradients /= ranks
    if stage >= 3:
        weights /= ranks
    return parameters * (weights + gradients + optimizer)


def zero_traffic_elements(parameters: float, stage: int) -> float:
    """Numbers each device sends in a step, for many devices: 2 per parameter up to stage 2, 3 in stage 3 (ZeRO, section 7)."""
    return parameters * (3 if stage >= 3 else 2)


def pipeline_bubble(stages: int, micro_batches: int, chunks: int = 1) -> float:
    """Idle share (0 to 1) of a step's whole time: (p - 1) / (v m + p - 1). The same for GPipe and 1F1B.

    chunks: v of interleaved 1F1B (2104.04473), which divides the bubble's time by v. Equal forward and backward times
    on every stage, communication left out. The Megatron paper divides by the busy time only and writes (p - 1) / (v m).
    """
    return (stages - 1) / (chunks * micro_batches + stages - 1)


def micro_batches_in_flight(stages: int, micro_batches: int, stage: int) -> int:
    """Micro-batches whose activations one stage of 1F1B keeps at its peak; stage counts from 0. GPipe keeps them all."""
    return min(stages - stage, micro_batches)


def effective_batch(micro_batch: int, accumulation: int, devices: int) -> int:
    """Samples that one optimizer step sees."""
    return micro_batch * accumulation * devices


def optimizer_steps(rows: int, batch: int, epochs: int) -> int:
    """Steps of a run that also uses the last, smaller batch of every epoch (transformers.Trainer)."""
    return math.ceil(rows / batch) * epochs


def warmup_steps(steps: int, share: float) -> int:
    """Warm-up steps for a share of the run, rounded up (transformers.TrainingArguments.get_warmup_steps)."""
    return math.ceil(round(steps * share, 9))


def nf4_bits_per_parameter(block: int = 64, nested_block: int | None = None) -> float:
    """Bits a weight: 4 and its share of the block's scale, fp32 or (double quantisation) 8 bits and a share of an fp32."""
    if nested_block is None:
        return 4 + 32 / block
    return 4 + 8 / block + 32 / (block * nested_block)


def double_quantisation_saving_bytes(parameters: float, block: int = 64, nested_block: int = 256) -> float:
    """Bytes that double quantisation saves on so many quantised weights."""
    saved_bits = nf4_bits_per_parameter(block) - nf4_bits_per_parameter(block, nested_block)
    return parameters * saved_bits / 8


def quantised_model_bytes(quantised: float, other: float, other_bytes: float) -> float:
    """A model in NF4 with double quantisation: `quantised` weights at 4.127 bits, the rest at `other_bytes` each.

    bitsandbytes leaves embeddings, norms and the output layer unquantised.
    """
    return quantised * nf4_bits_per_parameter(64, 256) / 8 + other * other_bytes


def logits_bytes(batch: int, sequence: int, vocabulary: int, bytes_per_element: int) -> int:
    """One copy of the logits (batch, sequence, vocabulary); the loss in fp32 often keeps a second and a gradient."""
    return batch * sequence * vocabulary * bytes_per_element


def layer_input_bytes(batch: int, sequence: int, hidden: int, layers: int, bytes_per_element: int = 2) -> int:
    """What full checkpointing keeps: the input (batch, sequence, hidden) of every layer (1604.06174's idea)."""
    return batch * sequence * hidden * layers * bytes_per_element


def kv_cache_bytes(tokens: int, kv_width: int, layers: int, bytes_per_element: int = 2) -> int:
    """Keys and values of so many tokens in all sequences together."""
    return 2 * tokens * kv_width * layers * bytes_per_element


def full_training_flops(parameters: float, tokens: float) -> float:
    """About 6 a parameter and token: 2 forward, 2 for the inputs' gradients, 2 for the weights'. Attention left out."""
    return 6 * parameters * tokens


def lora_training_flops(parameters: float, tokens: float) -> float:
    """About 4: the frozen weights need no gradient of their own, but gradients pass through them. Adapters left out."""
    return 4 * parameters * tokens


def replay_rows(new_rows: int, share: float) -> int:
    """Old rows to add so that they are `share` of the finished mix: n * share / (1 - share), rounded."""
    return round(new_rows * share / (1 - share))

"""What bitsandbytes 0.50.2 gets wrong on CPUs, each fault found by a function, and how to stay clear of them.

1. A row that is no multiple of the block is restored with wrong scales (AVX-512, row lengths that are a multiple of 16,
   rows shorter than a block too): no error, up to 80 % of the weights wrong. `wrong_rows` tells; no switch helps.
2. The first forward in eval mode repacks the weight in place for a fast path (AVX512-BF16). The weight then can no
   longer be restored, and later training steps get no gradient through that layer: `repacked` and `severed` tell.
3. The same repacking raises where out_features is no multiple of 32 or in_features none of the block: `eval_error`.
`make_safe(model)` switches the repacking off, which avoids 2 and 3, and refuses rows of fault 1.
4. The 8-bit quantiser for scales and optimizer states rounds by a table of cells, so that 0 does not come back as 0:
   `zero_comes_back_as`. Small, and harmless so far; told because it is not what the paper describes.
"""

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit
from torch import Tensor, nn

from finetune_lab.errors import UserError
from finetune_lab.methods.nf4 import dequantize, quantize


def repacks_in_eval() -> bool:
    """Whether this CPU takes the path of faults 2 and 3 (AVX512-BF16)."""
    return bool(has_avx512bf16())


def has_avx512() -> bool:
    """Whether this CPU takes the path of fault 1, as torch sees the CPU."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def wrong_rows(weight: Tensor, blocksize: int = 64) -> str | None:
    """Fault 1: quantise `weight` (out, in) and restore it with bitsandbytes and with `methods.nf4`; a sentence, or None.

    Give real weights, or ones whose columns differ in scale: in a freshly initialised layer all block maxima are much
    alike, and a wrong one then hardly shows.
    """
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
    theirs, ours = dequantize_4bit(packed, state), dequantize(quantize(weight, blocksize=blocksize))
    wrong = float((theirs != ours).float().mean())
    if not wrong:
        return None
    error = [float((w - weight).norm() / weight.norm()) for w in (theirs, ours)]
    return (
        f"bitsandbytes restores {wrong:.0%} of a {tuple(weight.shape)} weight wrongly (blocks of {blocksize}): relative "
        f"error {error[0]:.2f} instead of {error[1]:.2f}. Use rows that are a multiple of {blocksize}."
    )


def repacked(layer: bnb.nn.Linear4bit) -> str | None:
    """Fault 2, the state: a sentence when the layer's weight was repacked in place, so that it cannot be restored."""
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        return None
    return (
        "this layer's weight was repacked by a forward pass in eval mode: restoring or merging it gives garbage, and "
        "training gets no gradient through it. Load it again, and call make_safe(model) before the first forward."
    )


def severed(layer: bnb.nn.Linear4bit) -> str | None:
    """Fault 2, the effect: a sentence when the layer, in training mode, gives its input no gradient."""
    training = layer.training
    x = torch.randn(2, layer.in_features, requires_grad=True)
    try:
        (grad,) = torch.autograd.grad(layer.train()(x).sum(), x, allow_unused=True)
    except RuntimeError:  # nothing wants a gradient; with a trainable bias the repacked path raises
        grad = None
    finally:
        layer.train(training)
    if grad is not None:
        return None
    return "autograd finds no way from this layer's output to its input: adapters below it learn nothing."


def eval_error(layer: bnb.nn.Linear4bit) -> str | None:
    """Fault 3: the error that a forward pass in eval mode raises, or None. May repack the layer (fault 2): try a copy."""
    training = layer.training
    try:
        with torch.no_grad():
            layer.eval()(torch.randn(2, layer.in_features))
    except (AssertionError, RuntimeError) as error:
        return (
            f"a layer of {layer.in_features} inputs and {layer.out_features} outputs fails in eval mode "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Call make_safe(model) before the first forward."
        )
    finally:
        layer.train(training)
    return None


def zero_comes_back_as() -> float:
    """Fault 4: what 0 becomes in a block whose largest value is 1, through bitsandbytes' 8-bit quantiser."""
    block = torch.zeros(256)
    block[0] = 1.0
    codes, state = bnb.functional.quantize_blockwise(block, blocksize=256)
    return bnb.functional.dequantize_blockwise(codes, state)[1].item()


def make_safe(model: nn.Module) -> nn.Module:
    """Switch off the repacking of every `Linear4bit` (faults 2 and 3); returns the model. Call it before any forward.

    Raises UserError for a layer that was repacked already, and for one whose rows this CPU would restore wrongly
    (fault 1): in_features no multiple of the block.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, bnb.nn.Linear4bit):
            continue
        name = path or "the layer"
        if layer.weight.quant_state is not None and (told := repacked(layer)):
            raise UserError(f"{name}: {told}")
        blocksize = layer.weight.blocksize
        if layer.weight.device.type == "cpu" and layer.in_features % blocksize and has_avx512():
            raise UserError(
                f"{name} has {layer.in_features} inputs, no multiple of the block of {blocksize}: bitsandbytes 0.50.2 "
                "restores its weight wrongly on this CPU. Leave it out (llm_int8_skip_modules), or use NF4Linear."
            )
        layer.support_avx512bf16_for_cpu = False
    return model

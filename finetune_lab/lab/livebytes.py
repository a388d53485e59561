"""Live bytes: every storage that torch operations make, counted from birth to death, in a real training step.

What is counted: the bytes of each `untyped_storage` that an operation returns, once however many tensors share it,
until Python's and autograd's last reference is gone. What is not: scratch space inside a kernel (it never becomes a
tensor), the allocator's rounding, and the interpreter. torch.distributed._tools.MemTracker counts the same way, slower.
One distortion is stated: under any dispatch mode autograd adds gradients of a shared tensor out of place (its in-place
path asks for plain tensors), so one sum of two gradients is alive that an untraced run would not have.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Context manager: `live` bytes now, `peak` since `mark()`; known storages (a model's) are counted by `watch`."""

    def __init__(self, log: bool = False) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.at_peak = ""  # the operation that reached it
        self.log: list[tuple[str, int]] | None = [] if log else None
        self._known: dict[int, tuple[weakref.ref, int]] = {}

    def watch(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count storages that already exist; returns the bytes that were new."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        self.peak = max(self.peak, self.live)
        return self.live - before

    def mark(self) -> int:
        """Start a new phase: the peak of the last one is returned, the next begins at what is alive."""
        peak, self.peak = self.peak, self.live
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_, key=key, size=size) -> None:
            self.live -= size
            del self._known[key]

        self._known[key] = (weakref.ref(storage, gone), size)
        self.live += size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, str(func)
        if self.log is not None:
            self.log.append((str(func), self.live))
        return out


def step_bytes(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: torch.Tensor,
    labels: torch.Tensor,
    loss_of: Callable[[], torch.Tensor] | None = None,
) -> dict[str, int]:
    """Bytes of one real training step of a causal language model: zero_grad(set_to_none), loss, backward, step.
    loss_of: makes the loss of `ids` and `labels`; None: the model's own.

    Measured in the second step, when the optimizer's states exist. Keys: weights (parameters and what belongs to a
    quantised one), quantisation state, optimizer, gradients, saved (alive when the loss is there, without what stays and
    with ids and labels), forward, backward, step (the fullest moment of each), peak. Buffers are not counted.
    """
    with LiveBytes() as live:
        live.watch([*model.parameters(), *quantisation_tensors(model), ids, labels])
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            start = live.live
            live.mark()
            loss = loss_of() if loss_of else model(input_ids=ids, labels=labels).loss
            saved = live.live - start
            forward = live.mark()
            loss.backward()
            del loss
            backward = live.mark()
            gradients = live.live - start
            optimizer.step()
            step = live.mark()
        own = ids.nbytes + labels.nbytes
        weights = storage_bytes(model.parameters())
        quantised = storage_bytes(quantisation_tensors(model))
        states = start - weights - quantised - own
    peaks = {"forward": forward, "backward": backward, "step": step, "peak": max(forward, backward, step)}
    return {"weights": weights, "quantisation state": quantised, "optimizer": states, "gradients": gradients,
            "saved": saved + own, **peaks}  # fmt: skip


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of these tensors, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def quantisation_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """The scales, levels and offsets that bitsandbytes keeps beside the 4-bit and 8-bit weights of a model."""
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (state := getattr(weight, "quant_state", None)) is not None:
            found += [state.absmax, state.code]
            if state.nested:
                found += [state.offset, state.state2.absmax, state.state2.code]
        # 8 bits: row scales, which the first forward pass moves from the parameter to the layer's state
        for place in (weight, getattr(module, "state", None)):
            if (scales := getattr(place, "SCB", None)) is not None:
                found.append(scales)
    return found

"""What the tape counts: storages, the values that share them, and the nodes that keep them for backward.

A storage counts from its birth until Python's last reference to it is gone, as in torch. `tape.py` runs them.
Leaves out: data, strides, devices.
In production: c10::StorageImpl, at::Tensor, torch::autograd::Node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune_lab.methods.memory.tape import Tape


class Storage:
    """So many bytes of one kind, alive as long as this object."""

    __slots__ = ("bytes", "kind", "tape")

    def __init__(self, tape: Tape, size: int, kind: str) -> None:
        self.tape, self.bytes, self.kind = tape, size, kind
        tape.count(kind, size)

    def become(self, kind: str) -> None:
        self.tape.alive[self.kind] -= self.bytes
        self.tape.alive[kind] = self.tape.alive.get(kind, 0) + self.bytes
        self.kind = kind

    def __del__(self) -> None:
        self.tape.now -= self.bytes
        self.tape.alive[self.kind] -= self.bytes


class Value:
    """A tensor: `n` elements of `size` bytes in a storage (None: a parameter's, counted elsewhere).

    `node` made it, as its result number `slot`.
    """

    __slots__ = ("n", "node", "size", "slot", "storage")

    def __init__(self, storage: Storage | None, n: int, size: int, node: Node | None = None, slot: int = 0) -> None:
        self.storage, self.n, self.size, self.node, self.slot = storage, n, size, node, slot


class Node:
    """What backward needs of one operation: where gradients go, what was saved, and the function that makes them."""

    __slots__ = ("backward", "held", "order", "parents", "place", "saved", "shapes", "slots", "uses")

    def __init__(self, order: float, place: str, parents: list[Value], backward: Callable) -> None:
        self.order, self.place, self.backward = order, place, backward
        self.parents = [p.node for p in parents]
        self.slots = [p.slot for p in parents]
        self.shapes = [(p.n, p.size) for p in parents]
        self.saved: list = []
        self.held: Value | None = None
        self.uses = 0

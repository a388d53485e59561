"""A dry run of autograd: tensors that have a size and no data, so that bytes can be counted in microseconds.

What: operations take and give `Value`s. A storage counts from its birth until Python's last reference to it is gone, as
in torch; a `Node` keeps what its operation saves for backward; `backward` runs nodes in torch's order (the latest
operation first), frees what a node saved when it has run, and adds up gradients of a value that was used twice.
Formula: live bytes = sum over storages that are alive, by kind; a moment's figure is its largest sum.
Leaves out: data, kernels' scratch space, the allocator.
In production: torch.autograd (engine.cpp, input_buffer.cpp) under `torch.distributed._tools.MemTracker`.
"""

import heapq
import sys
import weakref
from collections.abc import Callable

from finetune_lab.methods.memory.values import Node, Storage, Value

RNG_STATE = 5056  # bytes of the CPU generator's state, which a checkpoint keeps
ALONE = 2  # references to a storage that only one Value holds, as sys.getrefcount counts them


class Stop(Exception):
    """Everything that backward needs of a checkpointed layer has been recomputed."""


class Frame:
    """One checkpointed call: its function and input; what it saved is recomputed when first asked for."""

    __slots__ = ("call", "found", "generator", "given", "places")

    def __init__(self, call: Callable, given: tuple) -> None:
        self.call, self.given, self.found, self.generator = call, given, None, None
        self.places: list[weakref.ref] = []


class Place:
    """Stands for a tensor that a node inside a checkpoint would have saved."""

    __slots__ = ("__weakref__", "frame", "number")

    def __init__(self, frame: Frame) -> None:
        self.frame, self.number = frame, len(frame.places)
        frame.places.append(weakref.ref(self))


class Tape:
    """Counts by kind (`alive`) and in all (`now`); `peaks`: place -> (bytes, {kind: bytes}) at the place's fullest.

    device: "cuda" or "cpu", where their kernels differ. traced: what a dispatch-mode tracker sees. It does not see
    buffers inside a kernel (`scratch`), and under it gradients are never added in place.
    """

    def __init__(self, device: str = "cuda", traced: bool = False) -> None:
        self.device, self.in_place, self.scratch = device, not traced, not traced
        self.now = 0
        self.alive: dict[str, int] = {}
        self.peaks: dict[str, tuple[int, dict[str, int]]] = {}
        self.place = "forward"
        self.order = 0
        self.frame: Frame | None = None
        self.again: Frame | None = None  # the frame that is being recomputed
        self.moment = "forward"
        self.gradients: list[Value] = []
        self.held: list[Value] = []

    def count(self, kind: str, size: int) -> None:
        self.now += size
        self.alive[kind] = self.alive.get(kind, 0) + size
        best = self.peaks.get(self.moment)
        if best is None or self.now > best[0]:
            self.peaks[self.moment] = (self.now, dict(self.alive))

    def new(self, n: int, size: int, kind: str = "temporaries") -> Value:
        return Value(Storage(self, n * size, kind), n, size)

    def parameter(self, n: int, size: int, trained: bool) -> Value:
        """A weight: its own bytes are counted elsewhere, its gradient ends in `gradients` (torch: AccumulateGrad)."""
        node = Node(float("inf"), self.place, [], Tape._accumulate) if trained else None
        return Value(None, n, size, node)

    def require_gradient(self, x: Value) -> None:
        """`x.requires_grad_()` on a result that needs none: its gradient is kept until the graph is gone."""

        def backward(tape, g, saved, wanted):
            tape.held.append(g)
            return []

        x.node = x.node or Node(float("inf"), self.place, [], backward)

    def _accumulate(self, gradient: Value, saved: list, wanted: list) -> list:
        gradient.storage.become("gradients")
        self.gradients.append(gradient)
        return []

    def keep(self, value: Value) -> object:
        """What a node stores for a saved tensor: the tensor, or inside a checkpoint only its number."""
        if self.again is not None:
            found, places = self.again.found, self.again.places
            wanted = places[len(found)]() is not None  # the node may be gone: DoRA's graph of the norm
            found[len(found)] = Value(value.storage, value.n, value.size) if wanted else None
            if len(found) == len(places):
                raise Stop
        elif self.frame is not None:
            return Place(self.frame)
        if value.storage is not None and value.storage.kind == "temporaries":
            value.storage.become("activations")
        return Value(value.storage, value.n, value.size)

    def apply(
        self,
        parents: list[Value],
        saves: list[Value],
        backward: Callable,
        n: int,
        size: int,
        *,
        keep_result: bool = False,
        kind: str = "temporaries",
        view: Value | None = None,
        holds: Value | None = None,
    ) -> Value:
        """The result (n elements of `size` bytes) of an operation; backward(tape, gradient, saved, wanted) -> gradients.

        view: the result shares this value's storage instead of having its own. holds: kept as an attribute of the
        node (`ctx.A = A`): no checkpoint sees it, and it lives as long as the graph.
        """
        node = None
        if any(p.node is not None for p in parents):
            self.order += 1
            node = Node(self.order, self.place, parents, backward)
            for value in saves:
                node.saved.append(self.keep(value))
            if holds is not None:
                if holds.storage.kind == "temporaries":
                    holds.storage.become("activations")
                node.held = Value(holds.storage, holds.n, holds.size)
        out = Value(view.storage, n, size) if view is not None else self.new(n, size, kind)
        if node is not None:
            out.node = node
            if keep_result:
                node.saved.append(self.keep(out))
        return out

    def checkpoint(self, call: Callable, *given: object) -> Value:
        """Run `call(*given)` and keep nothing but `given` (torch.utils.checkpoint, use_reentrant=False)."""
        self.frame = Frame(call, given)
        for value in given:
            if isinstance(value, Value) and value.storage.kind == "temporaries":
                value.storage.become("activations")
        if self.device == "cpu" and self.scratch:
            self.frame.generator = self.new(RNG_STATE, 1)
        out = call(*given)
        self.frame = None
        return out

    def _recall(self, saved: object) -> Value:
        if isinstance(saved, Value):
            return saved
        frame = saved.frame
        if frame.found is None:
            frame.found, self.again = {}, frame
            forked = self.new(RNG_STATE, 1) if frame.generator else None  # torch.random.fork_rng while it recomputes
            try:
                frame.call(*frame.given)
            except Stop:
                pass
            self.again = None
            del forked
        return frame.found.pop(saved.number)

    def _add(self, old: Value, new: Value) -> Value:
        if self.in_place and sys.getrefcount(old) <= ALONE + 1 and sys.getrefcount(old.storage) <= ALONE:
            return old
        return self.new(old.n, old.size, "gradients" if old.storage.kind == "gradients" else "temporaries")

    def backward(self, loss: Value) -> None:
        """Fill the gradients of all parameters that `loss` depends on."""
        stack, seen = [loss.node], {id(loss.node)}
        while stack:
            for parent in stack.pop().parents:
                if parent is not None:
                    parent.uses += 1
                    if id(parent) not in seen:
                        seen.add(id(parent))
                        stack.append(parent)
        seed = self.new(1, loss.size)  # held by the caller until the end
        buffers = {(id(loss.node), 0): seed}
        ready = [(-loss.node.order, 0, loss.node)]
        pushed = 0
        while ready:
            node = heapq.heappop(ready)[2]
            self.moment = f"backward of {node.place}"
            gradient = buffers.pop((id(node), 0), None)
            if (id(node), 1) in buffers:
                gradient = [gradient, buffers.pop((id(node), 1))]
            saved = [self._recall(s) for s in node.saved]
            gradients = node.backward(self, gradient, saved, [p is not None for p in node.parents])
            saved = None  # what was recomputed is gone before the casts below, what was kept is not
            for i, (n, size) in enumerate(node.shapes):  # torch: validate_outputs
                if gradients[i] is not None:
                    if gradients[i].n != n:
                        gradients[i] = self.new(n, gradients[i].size)
                    if gradients[i].size != size:
                        gradients[i] = self.new(n, size)
            node.saved, gradient = [], None
            for i, parent in enumerate(node.parents):
                if parent is None:
                    continue
                given, gradients[i] = gradients[i], None
                key = (id(parent), node.slots[i])
                if key in buffers:
                    buffers[key] = self._add(buffers.pop(key), given)
                else:
                    buffers[key] = given
                given = None
                parent.uses -= 1
                if parent.uses == 0:
                    pushed += 1
                    heapq.heappush(ready, (-parent.order, pushed, parent))
        self.held.clear()

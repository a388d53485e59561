"""The exercises of lesson 02, VRAM accounting: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (the gradient as optimizer state, 4 bytes for everything, all weights in four
bits), from published formulas (34 bytes a token and width) and from forum threads (tied weights counted twice).
"""

import torch
import torch.nn.functional as F
from torch import nn

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.methods import counts
from finetune_lab.methods.memory import schedule, tensors


class Toy(nn.Module):
    """Embedding, one linear layer, output layer: tied or not, the embedding frozen or not."""

    def __init__(self, vocab: int, width: int, tied: bool, bias: bool = False):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.linear = nn.Linear(width, width + 1, bias=bias)
        self.down = nn.Linear(width + 1, width, bias=False)
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.down(self.linear(self.embed(ids))))


# 02.1 held_bytes


class Tables(torch.optim.SGD):
    """A stand-in for an 8-bit optimizer: a state in bytes for each parameter, and one code book that all share."""

    def step(self) -> None:
        table = torch.zeros(256)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = {"step": 1, "state1": torch.zeros(p.shape, dtype=torch.uint8), "qmap1": table}


def held_cases(draw):
    plans = [("adamw", True, torch.float32), ("adamw", False, torch.bfloat16), ("momentum", True, torch.float32),
             ("tables", False, torch.float32), ("adamw, not stepped", True, torch.bfloat16)]  # fmt: skip
    for (vocab, width), (optimizer, frozen, dtype) in zip(draw.sizes(5, 5, 20), plans, strict=True):
        yield case({"vocab": vocab, "width": width, "tied": frozen, "frozen": frozen, "dtype": dtype, "optimizer": optimizer})  # fmt: skip


def trained(fn, plan):
    """Call `fn` with a model and an optimizer that have made the step that `plan` says."""
    model = Toy(plan["vocab"], plan["width"], plan["tied"]).to(plan["dtype"])
    model.linear.requires_grad_(not plan["frozen"])
    kinds = {"momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "tables": lambda p: Tables(p, lr=0.1)}
    optimizer = kinds.get(plan["optimizer"], torch.optim.AdamW)(model.parameters())
    if "not stepped" not in plan["optimizer"]:
        model(torch.arange(4)).sum().backward()
        optimizer.step()
    return fn(model, optimizer)


def state_of(optimizer):
    return [x for entry in optimizer.state.values() for x in entry.values() if torch.is_tensor(x)]


def elements_times(each):
    """Tensors -> bytes by `each(tensor)`, without asking whether two share a storage."""
    return lambda tensors: sum(t.numel() * each(t) for t in tensors)


def held(weights=None, gradients=None, optimizer=None):
    """`held_bytes` with one part counted in another way: functions of (model, optimizer)."""

    def held_bytes(model, optim):
        right = tensors.held_bytes(model, optim)
        ways = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
        return {name: right[name] if way is None else way(model, optim) for name, way in ways.items()}

    return held_bytes


by_size = elements_times(torch.Tensor.element_size)


def always_four(model, optimizer):
    four = elements_times(lambda t: 4)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"weights": four(model.parameters()), "gradients": four(gradients), "optimizer": four(state_of(optimizer))}


def only_counted(model, optimizer):
    one = elements_times(lambda t: 1)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {"weights": one(model.parameters()), "gradients": one(gradients), "optimizer": one(state_of(optimizer))}


def gradient_as_state(model, optim):
    right = tensors.held_bytes(model, optim)
    return right["optimizer"] + right["gradients"]


GRADIENT = "the gradient is no optimizer state: it exists for every optimizer, and is counted once, under gradients"


def gradient_inside(one, expected, got):
    """The same myth beside another mistake: the first case that fails tells it."""
    if expected["gradients"] and got["optimizer"] == expected["optimizer"] + expected["gradients"]:
        return GRADIENT
    return None


exercise(
    "02.1", "what a model and its optimizer hold", tensors.held_bytes, held_cases, call=trained, diagnose=gradient_inside,
    wrong=[
        Wrong(held(weights=lambda m, o: by_size(m.state_dict().values())), "tied weights are counted twice: state_dict() "
              "lists them under both names; count each storage once"),
        Wrong(always_four, "4 bytes fit fp32 only: ask the tensor, with element_size() or untyped_storage().nbytes()"),
        Wrong(only_counted, "these are numbers of elements: multiply by the bytes of one element"),
        Wrong(held(gradients=lambda m, o: by_size(m.parameters())), "a frozen parameter has no gradient, and before "
              "backward nothing has: count p.grad where it is not None"),
        Wrong(held(weights=lambda m, o: by_size(p for p in m.parameters() if p.requires_grad)), "frozen weights lie in "
              "memory too: count all parameters"),
        Wrong(held(optimizer=lambda m, o: 2 * by_size(p for p in m.parameters() if p.requires_grad)), "two moments a "
              "parameter is a rule for AdamW after its first step: count the tensors that lie in optimizer.state"),
        Wrong(held(optimizer=gradient_as_state), GRADIENT),
        Wrong(held(optimizer=lambda m, o: by_size(state_of(o))), "a storage that several states share (the code book of "
              "8-bit states) lies in memory once: key by untyped_storage().data_ptr()"),
    ],
)  # fmt: skip


# 02.2 bytes_per_parameter

ROWS = [  # what each row adds up, and what people write there instead
    ("bf16 everywhere, four tensors",
     {4: "the two moments are missing", 6: "AdamW keeps two moments, m and v, and there is a gradient",
      10: "bf16 is 2 bytes, for the moments too", 12: "those are fp32 moments: here they are bf16",
      16: "4 bytes each would be fp32"}),
    ("weights and gradients as in row 1, the moments in fp32",
     {8: "fp32 moments have 4 bytes each, and there are two", 10: "the gradient is missing, 2 bytes",
      14: "weights and gradients are bf16, 2 bytes each", 16: "there is no master copy in this row"}),
    ("row 2 and an fp32 master copy",
     {12: "the master copy is missing", 14: "the master copy has 4 bytes, not 2, and the bf16 gradient counts too",
      18: "the gradient is bf16 in this row"}),
    ("fp32 everywhere, four tensors",
     {8: "fp32 is 4 bytes, for all four", 12: "three tensors of 4 bytes; there are four: weights, gradients, m and v",
      14: "the weights are fp32 here, and nothing is bf16", 18: "there is no bf16 copy in this row", 20: "AdamW keeps two moments, not three"}),
    ("row 4 and a bf16 copy",
     {14: "weights, copy, gradient, m and v: five tensors", 16: "the bf16 copy counts too, and the gradient is fp32",
      20: "the copy is bf16, 2 bytes", 12: "the weights lie there twice, and there are two moments"}),
]  # fmt: skip


def first_wrong_row(one, expected, got):
    if not isinstance(got, list | tuple) or len(got) != len(expected):
        return "write a list of five numbers, one for each row"
    for n, (want, have, (says, typical)) in enumerate(zip(expected, got, ROWS, strict=True), 1):
        if have is ...:
            return f"row {n} is not filled in yet"
        if have != want:
            return f"row {n} is the first that differs ({says}): {typical.get(have, 'add up its tensors one by one')}"
    return None


exercise(
    "02.2", "five ways to count", [8, 12, 16, 16, 18], name="bytes_per_parameter", diagnose=first_wrong_row,
    wrong=[
        Wrong([8, 12, 14, 16, 18], "row 3: the master copy has 4 bytes, not 2, since it is fp32, and the bf16 weights and gradients still count"),
        Wrong([8, 12, 16, 12, 18], "row 4: three tensors of 4 bytes are 12; there are four: weights, gradients, m and v"),
        Wrong([12, 8, 16, 16, 18], "rows 1 and 2 are swapped: the moments of row 1 are bf16, of row 2 fp32"),
        Wrong([8, 12, 16, 18, 16], "rows 4 and 5 are swapped: row 5 is row 4 and a bf16 copy"),
        Wrong([6, 10, 14, 12, 14], "the gradients are missing: 2 bytes each in bf16, 4 in fp32"),
        Wrong([6, 8, 12, 12, 14], "AdamW keeps two moments, m and v"),
        Wrong([8, 12, 12, 16, 18], "the fp32 master weight of mixed precision is missing: 4 bytes more in the third row"),
        Wrong([8, 12, 16, 16, 16], "the last row holds the weights twice, fp32 and bf16, and its gradient is fp32: 6 + 4 + 8"),
        Wrong([16, 16, 16, 16, 16], "16 is one regime, not a law: torch.optim.AdamW keeps its moments in the parameter's "
              "dtype, so loading in bf16 halves everything"),
        Wrong([12, 12, 12, 12, 12], "'12 bytes' are master weight, m and v alone: weights and gradients come on top"),
    ],
)  # fmt: skip


# 02.3 saved_bytes


def graph_cases(draw):
    for (rows, width), kind in zip(draw.sizes(5, 3, 9), ("mlp", "twice", "view", "bf16", "tanh"), strict=True):
        yield case({"rows": rows, "width": width, "kind": kind})


def on_graph(fn, plan):
    """Call `fn` with a forward pass and its parameters."""
    dtype = torch.bfloat16 if plan["kind"] == "bf16" else torch.float32
    x = torch.ones(plan["rows"], plan["width"], dtype=dtype)
    up = nn.Linear(plan["width"], 2 * plan["width"], dtype=dtype)
    down = nn.Linear(2 * plan["width"], 3, dtype=dtype)
    graphs = {
        "twice": lambda: (up(x) * up(x).exp()).sum(),
        "view": lambda: down(F.silu(up(x)).view(2, -1).view(plan["rows"], -1).t().contiguous().t()[1:]).sum(),
        "tanh": lambda: down(up(x).tanh()).square().sum(),
    }
    return fn(graphs.get(plan["kind"], lambda: down(F.silu(up(x))).sum()), [*up.parameters(), *down.parameters()])


def counted(size, skip=True, key=None):
    """`saved_bytes` with another size of a tensor, with the parameters, or with another identity."""

    def saved_bytes(forward, parameters):
        own = {p.untyped_storage().data_ptr() for p in parameters} if skip else set()
        kept, found = {}, []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                found.append(size(tensor))
                kept[key(tensor) if key else len(kept)] = size(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = forward()
        del result
        return sum(kept.values())

    return saved_bytes


def pointer(tensor):
    return tensor.untyped_storage().data_ptr()


def whole(tensor):
    return tensor.untyped_storage().nbytes()


def result_only(forward, parameters):
    result = forward()
    return result.numel() * result.element_size()


exercise(
    "02.3", "what autograd keeps", tensors.saved_bytes, graph_cases, call=on_graph,
    wrong=[
        Wrong(counted(whole, skip=False, key=pointer), "the weights are in it: autograd saves them too, but they lie in "
              "memory anyway; skip the storages of `parameters`"),
        Wrong(counted(whole), "a storage that two operations save is counted twice: keep a dict, address -> bytes"),
        Wrong(counted(whole, skip=False), "weights and repeated storages are in it: skip the parameters' storages and "
              "count every address once"),
        Wrong(counted(lambda t: t.numel() * t.element_size(), key=pointer), "a view keeps its whole storage alive: count "
              "untyped_storage().nbytes(), not the view's elements"),
        Wrong(counted(lambda t: whole(t) // t.element_size(), key=pointer), "these are elements: bytes are "
              "untyped_storage().nbytes()"),
        Wrong(result_only, "that is the size of the result: the graph behind it holds the activations; use the hooks"),
    ],
)  # fmt: skip


# 02.4 layer_saved_bytes


def layer_cases(draw):
    yield case(4096, 14_336, 4096, 1024, 32)
    for _ in range(4):
        heads, size = draw.choice([3, 5, 8]), draw.choice([32, 64, 128])
        groups = draw.choice([1, 2])
        yield case(64 * draw.randint(3, 40), 64 * draw.randint(41, 90), heads * size, groups * size, heads)


def layer(norms=None, inputs=None, attention=None, mlp=None):
    """`layer_saved_bytes` with one of its four lines counted in another way."""

    def layer_saved_bytes(hidden, intermediate, q_width, kv_width, heads):
        h, i, q, k = hidden, intermediate, q_width, kv_width
        lines = {"norms": 12 * h + 8, "inputs": 4 * h, "attention": 4 * q + 4 * k + 4 * heads, "mlp": 8 * i}
        ways = {"norms": norms, "inputs": inputs, "attention": attention, "mlp": mlp}
        return sum(lines[name] if way is None else way(h, i, q, k, heads) for name, way in ways.items())

    return layer_saved_bytes


def korthikanti(hidden, intermediate, q_width, kv_width, heads):
    return 34 * hidden


exercise(
    "02.4", "what one layer keeps for a token", tensors.layer_saved_bytes, layer_cases,
    wrong=[
        Wrong(layer(norms=lambda h, *_: 4 * h), "the norms compute in fp32: each keeps its input at 4 bytes and 1/rms (4), "
              "beside the normalised row at 2"),
        Wrong(layer(norms=lambda h, *_: 8 * h + 8), "each norm's input is kept in fp32: 4 bytes a number, not 2; only the "
              "normalised row is bf16"),
        Wrong(layer(norms=lambda h, *_: 8 * h + 4), "norms compute in fp32: their input has 4 bytes a number, and 1/rms 4 "
              "bytes as well"),
        Wrong(layer(norms=lambda h, *_: 6 * h + 4), "a layer has two norms"),
        Wrong(layer(norms=lambda h, *_: 12 * h), "1/rms is missing: one fp32 number a token for each of the two norms"),
        Wrong(layer(inputs=lambda h, *_: 2 * 5 * h), "q, k and v read one and the same row, gate and up another: two rows "
              "in all"),
        Wrong(layer(attention=lambda h, i, q, k, n: 8 * q + 4 * n), "keys and values have the width of the key/value "
              "heads: kv_width, not q_width"),
        Wrong(layer(attention=lambda h, i, q, k, n: 4 * q + 4 * k), "the log-sum-exp is missing: one fp32 number a head"),
        Wrong(layer(attention=lambda h, i, q, k, n: 2 * q + 4 * k + 4 * n), "the attention's output is kept as well as q"),
        Wrong(layer(mlp=lambda h, i, *_: 6 * i), "four rows of the intermediate width are kept: gate, silu(gate), up and "
              "their product"),
        Wrong(korthikanti, "34 * hidden is the formula of 2205.05198 for GPT-3's layer (GELU, 4 h, dropout, no fp32 norm "
              "copies): add up the rows of this layer"),
    ],
)  # fmt: skip


# 02.5 keep_every


def chain_cases(draw):
    yield case(12, 4)
    for layers, step in ((9, 3), (13, 5), (draw.randint(14, 20), 4), (draw.randint(21, 30), 6)):
        yield case(layers, step)


def played(fn, layers, step):
    """(slots, forwards) of the schedule; play raises its sentence for a schedule that breaks a rule."""
    done = schedule.play(fn(layers, step), layers)
    return done.peak, done.forwards


def not_worse(expected, got):
    if got[0] > expected[0]:
        return f"the schedule holds {got[0]} activations at its peak, {expected[0]} are enough"
    if got[1] > expected[1]:
        return f"the schedule runs {got[1]} forwards, {expected[1]} are enough"
    return None


def nothing_dropped(layers, step):
    return schedule.keep_all(layers)


def back(start, stop):
    return [("backward", i) for i in range(stop, start, -1)]


def first_pass(layers, step, last):
    actions = []
    for i in range(1, layers + 1):
        actions.append(("forward", i))
        if i - 1 < last and (i - 1) % step:
            actions.append(("drop", i - 1))
    return actions


def from_the_batch(layers, step):
    """Each stretch is run again from layer 1 on."""
    last = (layers - 1) // step * step
    actions = first_pass(layers, step, last)
    for start in range(last, -1, -step):
        if start < last:
            actions += [("forward", i) for i in range(1, start + step)]
        actions += back(start, min(start + step, layers))
    return actions


def last_again(layers, step):
    """The last stretch is dropped too, and run again."""
    actions = first_pass(layers, step, layers)
    for start in range((layers - 1) // step * step, -1, -step):
        stop = min(start + step, layers)
        actions += [("forward", i) for i in range(start + 1, stop)] + back(start, stop)
    return actions


def one_more(layers, step):
    """The kept end of a stretch is run again too."""
    last = (layers - 1) // step * step
    actions = first_pass(layers, step, last)
    for start in range(last, -1, -step):
        stop = min(start + step, layers)
        if start < last:
            actions += [("forward", i) for i in range(start + 1, stop + 1)]
        actions += back(start, stop)
    return actions


def never_again(layers, step):
    return first_pass(layers, step, (layers - 1) // step * step) + back(0, layers)


def upwards(layers, step):
    """Each stretch goes back in forward order."""
    last = (layers - 1) // step * step
    return first_pass(layers, step, last) + [("backward", i) for i in range(last + 1, layers + 1)]


def drops_itself(layers, step):
    actions = []
    for i in range(1, layers + 1):
        actions += [("forward", i)] + [("drop", i)] * (i % step > 0)
    return actions


exercise(
    "02.5", "a step in few slots", schedule.keep_every, chain_cases, call=played, compare=not_worse,
    wrong=[
        Wrong(nothing_dropped, "nothing is dropped: behind each forward, drop the activation before it, unless its number "
              "is a multiple of step or it lies in the last stretch"),
        Wrong(last_again, "the last stretch is dropped and run again for nothing: its backward comes at once, so keep it"),
        Wrong(one_more, "the end of a stretch is a kept activation: run again only the layers before it"),
        Wrong(from_the_batch, "a stretch is run again from the kept activation before it, not from layer 1"),
        Wrong(never_again, "an activation that was dropped must be made again before its layer goes back"),
        Wrong(upwards, "layers go back in falling order: the last one first"),
        Wrong(drops_itself, "the next layer needs the activation that was just made: drop the one before it"),
    ],
)  # fmt: skip


# 02.6 nf4_model_bytes


def nf4_cases(draw):
    for (vocab, width), other_bytes, (tied, bias) in zip(
        draw.sizes(4, 300, 900), (2, 4, 2, 4), ((False, False), (True, False), (False, True), (True, True)), strict=True
    ):
        yield case({"vocab": vocab, "width": width, "tied": tied, "bias": bias}, other_bytes)


def on_toy(fn, plan, other_bytes):
    with torch.device("meta"):
        model = Toy(**plan | {"tied": False})
    if plan["tied"]:
        model.lm_head.weight = model.embed.weight
    return fn(model, other_bytes)


BITS = counts.nf4_bits_per_parameter(64, 256)


def floor(bits=BITS, chosen=lambda name, m: isinstance(m, nn.Linear) and name != "lm_head", other=None, bias=False):
    """`nf4_model_bytes` with other bits, other layers quantised, or another size of the rest."""

    def nf4_model_bytes(model, other_bytes):
        layers = [m for name, m in model.named_modules() if chosen(name, m)]
        quantised = sum(p.numel() for m in layers for p in (m.parameters() if bias else [m.weight]))
        rest = sum(p.numel() for p in model.parameters()) - quantised
        return quantised * bits / 8 + rest * (other_bytes if other is None else other)

    return nf4_model_bytes


exercise(
    "02.6", "the floor of a 4-bit model", tensors.nf4_model_bytes, nf4_cases, call=on_toy,
    wrong=[
        Wrong(lambda model, other_bytes: sum(p.numel() for p in model.parameters()) * BITS / 8, "not everything is "
              "quantised: embeddings, norms and the output layer stay at other_bytes"),
        Wrong(lambda model, other_bytes: sum(p.numel() for p in model.parameters()) / 2, "'half a byte a parameter' "
              "forgets the scales (4.127 bits) and the layers that stay unquantised"),
        Wrong(floor(chosen=lambda name, m: isinstance(m, nn.Linear)), "bitsandbytes takes linear layers only, and not the "
              "last one: the embedding and lm_head stay at other_bytes"),
        Wrong(floor(bits=4), "4 bits are the codes alone: add the scales, nf4_bits_per_parameter(64, 256)"),
        Wrong(floor(bits=4.5), "4.5 bits are without double quantisation: nf4_bits_per_parameter(64, 256)"),
        Wrong(floor(bits=8 * BITS), "these are bits: 8 to a byte"),
        Wrong(floor(other=2), "the rest costs other_bytes each: after prepare_model_for_kbit_training that is 4, not 2"),
        Wrong(floor(bias=True), "only the weight of a linear layer is quantised, not its bias"),
    ],
)  # fmt: skip


# 02.7 zero_bytes_per_rank


def zero_cases(draw):
    for stage in (0, 1, 2, 3, 2):
        yield case(float(draw.randint(10**6, 10**9)), draw.choice([2, 3, 4, 8, 64]), stage)


def zero(optimizer=12.0, gradients=2.0, sharded_by=(3, 2, 1), divide=lambda value, ranks: value / ranks):
    """`zero_bytes_per_rank` with other sizes, or with weights, gradients and optimizer sharded from other stages on."""

    def zero_bytes_per_rank(parameters, ranks, stage):
        parts = (2.0, gradients, optimizer)
        each = [divide(part, ranks) if stage >= first else part for part, first in zip(parts, sharded_by, strict=True)]
        return parameters * sum(each)

    return zero_bytes_per_rank


exercise(
    "02.7", "ZeRO, bytes on each device", counts.zero_bytes_per_rank, zero_cases,
    wrong=[
        Wrong(zero(optimizer=8.0), "the optimizer's part is 12 bytes: fp32 master weight, m and v"),
        Wrong(zero(sharded_by=(1, 1, 1)), "each stage shards one thing more: 1 optimizer, 2 also gradients, 3 also weights"),
        Wrong(zero(sharded_by=(1, 2, 3)), "the wrong order: stage 1 shards the optimizer, the largest part, first"),
        Wrong(zero(sharded_by=(3, 1, 2)), "stage 1 shards the optimizer's state, stage 2 also the gradients"),
        Wrong(zero(sharded_by=(9, 2, 1)), "stage 3 shards the weights too"),
        Wrong(zero(sharded_by=(3, 2, 9)), "the optimizer's state is sharded from stage 1 on: FSDP and ZeRO-3 shard it too"),
        Wrong(zero(gradients=4.0), "gradients are 2 bytes in this count: bf16"),
        Wrong(zero(divide=lambda value, ranks: value * ranks), "sharding divides: each rank holds one part of ranks parts"),
    ],
)  # fmt: skip

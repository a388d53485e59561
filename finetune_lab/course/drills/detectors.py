"""The detectors of the bug drills: each runs a snippet's function on something small and says what is still wrong.

`detector(namespace) -> None` when healthy, else one sentence; `namespace` holds the globals of the executed snippet.
Each looks at behaviour (gradients, outputs, weights), never at the text, so every repair that works is right.
Every detector first asks whether the snippet still trains: the shipped ones all do.
"""

import copy
import functools
import math
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune_lab.course.drills.toys import Regressor, TinyLM, Tokenizer, step
from finetune_lab.methods.loss import sft_loss

IDLE = "it does not train"


def detector(look: Callable[[dict], str | None]) -> Callable[[dict], str | None]:
    """Seed torch, and turn an error of the snippet into a sentence."""

    @functools.wraps(look)
    def detect(namespace: dict) -> str | None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                return look(namespace)
            except Exception as error:  # noqa: BLE001 (a repair may raise anything)
                said = str(error).strip().splitlines() or [""]
                return f"it raises {type(error).__name__}: {said[0][:160]}"

    return detect


def trains(losses: list[float]) -> str | None:
    """None when the losses are numbers that fall."""
    if not all(math.isfinite(loss) for loss in losses):
        return f"{IDLE}: the loss is {losses[-1]}"
    return None if losses[-1] < 0.95 * losses[0] else f"{IDLE}: the loss goes from {losses[0]:.3g} to {losses[-1]:.3g}"


def watch(model: nn.Module) -> list:
    """Every later call of a TinyLM as (keyword arguments, output, was the model in training mode); gradients kept."""
    seen = []

    def hook(module, args, kwargs, output):
        if output.logits.requires_grad:
            output.logits.retain_grad()
        seen.append((kwargs, output, module.training))

    model.register_forward_hook(hook, with_kwargs=True)
    return seen


def counted(logits: Tensor) -> Tensor:
    """Which positions (batch, seq) got a gradient: the loss asked them for a token."""
    return logits.grad.abs().sum(-1) > 0


@detector
def prompt_masked(namespace: dict) -> str | None:
    """The loss counts every token of the answer and none of the prompt."""
    prompt, answer, model = torch.tensor([3, 7, 2, 9]), torch.tensor([5, 1, 8]), TinyLM()
    seen = watch(model)
    losses = namespace["run"](model, prompt, answer)
    if trouble := trains(losses):
        return trouble
    asked = counted(seen[0][1].logits)[0]
    if asked[: len(prompt) - 1].any():
        return "tokens of the prompt are still counted in the loss"
    if not asked[len(prompt) - 1 : -1].all():
        return "a token of the answer is not counted in the loss"
    return None


@detector
def labels_shifted_once(namespace: dict) -> str | None:
    """Trained to count 0, 1, 2, ... the model must continue n with n + 1."""
    rows, model = torch.stack([(torch.arange(9) + start) % 12 for start in range(12)]), TinyLM()
    if trouble := trains(namespace["run"](model, rows)):
        return trouble
    said = model(rows).logits.argmax(-1)
    if torch.equal(said, (rows + 1) % 12):
        return None
    ahead = ((said - rows) % 12).flatten().mode().values.item()
    words = {0: "repeats the token it has just read", 2: "writes the token AFTER the next one"}
    return f"after training the model {words.get(ahead, 'does not write the next token')}"


@detector
def end_of_turn_learnt(namespace: dict) -> str | None:
    """With pad = eos the real end token of each row still has a label, and the padding has none."""
    eos, model = 11, TinyLM()
    rows = [[3, 7, 2, eos], [5, 1, eos], [8, 4, 6, 2, 9, eos]]
    seen = watch(model)
    if trouble := trains(namespace["run"](model, rows, eos)):
        return trouble
    asked = counted(seen[0][1].logits)
    for row, flags in zip(rows, asked, strict=True):
        if flags[len(row) - 1 :].any():
            return "padding is counted in the loss"
        if not flags[len(row) - 2]:
            return "the end-of-turn token has no label: the model never learns to stop"
        if not flags[: len(row) - 1].all():
            return "a real token has lost its label"
    return None


@detector
def token_mean(namespace: dict) -> str | None:
    """Accumulated gradients are those of the mean over all labelled tokens of the window."""
    draw = torch.Generator().manual_seed(1)
    batches = []
    for kept in (2, 9):
        ids = torch.randint(0, 12, (1, 12), generator=draw)
        batches.append((ids, ids.masked_fill(torch.arange(12) < 12 - kept, -100)))
    total, model = 11, TinyLM()
    seen = watch(model)
    if trouble := trains(namespace["run"](model, batches)):
        return trouble
    ratios = []
    for (_, labels), (_, output, _) in zip(batches, seen, strict=False):
        logits = output.logits.detach().requires_grad_()
        sft_loss(logits, labels, total).backward()
        ratios.append((output.logits.grad.norm() / logits.grad.norm()).item())
    if abs(ratios[0] / ratios[1] - 1) > 1e-3:
        return f"a token of the short micro-batch weighs {ratios[0] / ratios[1]:.3g} times one of the long micro-batch"
    return None if abs(ratios[0] - 1) < 1e-3 else f"the gradient is {ratios[0]:.3g} times that of the token mean"


@detector
def padding_invisible(namespace: dict) -> str | None:
    """In the first forward pass each row gives the logits that it gives alone, without padding."""
    model, pad = TinyLM(), 0
    alone, seen = copy.deepcopy(model), watch(model)
    rows = [[3, 7, 2, 5], [5, 1], [8, 4, 6, 2, 9, 3]]
    if trouble := trains(namespace["run"](model, rows, pad)):
        return trouble
    for row, logits in zip(rows, seen[0][1].logits, strict=True):
        off = (logits[-len(row) :] - alone(torch.tensor([row])).logits[0]).abs().max().item()
        if off > 1e-4:
            return f"padding changes the logits of a row of {len(row)} tokens by up to {off:.2g}"
    return None


@detector
def samples_apart(namespace: dict) -> str | None:
    """In the first forward pass each packed sample gives the logits that it gives alone."""
    model = TinyLM()
    alone, seen = copy.deepcopy(model), watch(model)
    first, second = torch.tensor([3, 7, 2, 5]), torch.tensor([5, 1, 8, 4, 6])
    if trouble := trains(namespace["run"](model, first, second)):
        return trouble
    logits = seen[0][1].logits[0]
    for name, sample, part in (("first", first, logits[:4]), ("second", second, logits[4:])):
        off = (part - alone(sample[None]).logits[0]).abs().max().item()
        if off > 1e-4:
            return f"the {name} sample's logits differ by up to {off:.2g} from those it has alone in a row"
    return None


@detector
def lora_layer(namespace: dict) -> str | None:
    """The layer starts as the base, both matrices are trainable parameters that learn, and the update uses its rank."""
    base, head = nn.Linear(7, 5), nn.Linear(5, 3)
    x, y = torch.randn(64, 7), torch.randn(64, 3)
    layer = namespace["LoRA"](copy.deepcopy(base))
    start = (layer(x) - base(x)).abs().max().item()
    optimizer = torch.optim.AdamW([*(p for p in layer.parameters() if p.requires_grad), *head.parameters()], lr=0.02)
    losses = [step(F.mse_loss(head(layer(x)), y), optimizer) for _ in range(60)]
    if trouble := trains(losses):
        return trouble
    if start > 1e-6:
        return f"before the first step the layer already differs from its base by up to {start:.2g}"
    named = dict(layer.named_parameters())
    lost = [name for name in ("A", "B") if name not in named]
    if lost:
        return f"{lost[0]} is no parameter: it is neither trained nor saved"
    if not torch.equal(layer.base.weight, base.weight):
        return "the base weight has changed: it must stay frozen"
    update = layer.B @ layer.A
    if update.abs().max() < 1e-6:
        return "after 60 steps B A is still zero: the adapter has learnt nothing, only the head has"
    values = torch.linalg.svdvals(update)
    return None if values[1] > 1e-3 * values[0] else "the update has rank 1: all rows of A are alike and stay alike"


@detector
def merged_like_trained(namespace: dict) -> str | None:
    """The merged layer alone must do as well as base and adapter did in the last step of training."""
    base, x = nn.Linear(7, 5).requires_grad_(False), torch.randn(64, 7)
    y = base(x) + 0.4 * x @ torch.randn(7, 5)
    losses = namespace["run"](base, x, y)
    if trouble := trains(losses):
        return trouble
    merged = F.mse_loss(base(x), y).item()
    if merged > 1.1 * losses[-1] + 1e-3:
        return f"the last training loss is {losses[-1]:.3g}, the merged layer's is {merged:.3g}"
    return None


@detector
def evaluated_without_dropout(namespace: dict) -> str | None:
    """Scores come from a model in eval mode, updates from one in training mode."""
    model = TinyLM(dropout=0.3)
    rows = (torch.arange(9) + torch.arange(12)[:, None]) % 12
    train, held_out = rows[::2], rows[1::2]
    seen = watch(model)
    losses, scores = namespace["run"](model, train, held_out)
    model.eval()
    if trouble := trains([sum(losses[:5]), sum(losses[-5:])]):
        return trouble
    if not all(training for _, output, training in seen if output.logits.requires_grad):
        return "training steps run in eval mode: dropout is off where it should be on"
    score = model(held_out, labels=held_out).loss.item()
    if abs(scores[-1] - score) > 1e-5:
        return f"the last score is {scores[-1]:.3f}; the same weights without dropout score {score:.3f}"
    return None


@detector
def answer_logps(namespace: dict) -> str | None:
    """The mean log-probability is that of the answer's tokens alone; a few DPO steps with it must lower the loss."""
    model = TinyLM(seed=3)
    reference = copy.deepcopy(model)
    prompt, chosen, rejected = torch.tensor([3, 7, 2, 9, 4, 4]), torch.tensor([5, 1]), torch.tensor([8, 8, 6, 2, 10])
    got = [namespace["logp"](model, prompt, answer).item() for answer in (chosen, rejected)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = [step(namespace["loss"](model, reference, prompt, chosen, rejected, 2.0), optimizer) for _ in range(20)]
    if trouble := trains(losses):
        return trouble
    for answer, value in zip((chosen, rejected), got, strict=True):
        ids = torch.cat([prompt, answer])[None]
        labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
        right = -reference(ids, labels=labels).loss.item()
        if abs(value - right) > 1e-4:
            return f"the answer of {len(answer)} tokens has mean log-probability {right:.3f}, the function says {value:.3f}"
    return None


@detector
def adapters_trained(namespace: dict) -> str | None:
    """The adapter's matrices move, and the frozen layer does not."""
    model, x = Regressor(), torch.randn(64, 6)
    frozen = model.layer.weight.detach().clone()
    if trouble := trains(namespace["run"](model, x, torch.randn(64, 3))):
        return trouble
    if not hasattr(model.layer, "B"):
        return "there is no adapter on the layer"
    if not torch.equal(model.layer.base.weight, frozen):
        return "the frozen layer has moved: train the adapter instead"
    return None if model.layer.B.abs().max() > 1e-6 else "B is still zero: the optimizer does not hold the adapter"


@detector
def one_start_token(namespace: dict) -> str | None:
    """The model reads exactly one start token, the first."""
    model, tokenizer = TinyLM(vocab=30), Tokenizer()
    messages = [{"role": "user", "content": "where is it"}, {"role": "assistant", "content": "here"}]
    seen = []
    model.embed.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    if trouble := trains(namespace["run"](model, tokenizer, messages)):
        return trouble
    ids = seen[0][0].tolist()
    if ids[:1] != [tokenizer.bos_token_id] or ids.count(tokenizer.bos_token_id) != 1:
        return f"the model reads {ids.count(tokenizer.bos_token_id)} start tokens, expected one, at the front"
    rest = [0, *tokenizer.encode("<user>whereisit<end><assistant>here<end>", add_special_tokens=False)]
    return None if ids == rest else "a token of the conversation is lost"


@detector
def anchor_holds(namespace: dict) -> str | None:
    """With a stiff penalty the weights end much nearer to where they started than without one."""
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    moved = {}
    for strength in (0.0, 5.0):
        torch.manual_seed(2)
        model = nn.Linear(6, 3)
        start = model.weight.detach().clone()
        ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        losses = namespace["run"](model, x, y, ones, strength)
        if strength == 0 and (trouble := trains(losses)):  # a stiff penalty may well stop the learning
            return trouble
        moved[strength] = (model.weight - start).norm().item()
    share = moved[5.0] / moved[0.0]
    return None if share < 0.5 else f"with the penalty the weights move {share:.0%} as far as without: it does nothing"


@detector
def graphs_released(namespace: dict) -> str | None:
    """What one held-out batch keeps for backward is gone when the next one is scored, and the score is their mean."""
    model, alive, counts = TinyLM(), weakref.WeakSet(), []
    rows = (torch.arange(9) + torch.arange(12)[:, None]) % 12
    batches = rows[1::2].split(2)

    class Kept:  # what autograd holds instead of a saved tensor
        def __init__(self, tensor: Tensor):
            self.tensor = tensor.detach()  # with its history it would hold the graph that holds it
            alive.add(self)

    model.register_forward_pre_hook(lambda *_: counts.append(len(alive)))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        losses, score = namespace["run"](model, rows[::2], batches)
    if trouble := trains(losses):
        return trouble
    if counts[-1]:
        return f"when the last batch is scored, {counts[-1]} tensors of the earlier ones still wait for a backward pass"
    mean = sum(model(batch, labels=batch).loss.item() for batch in batches) / len(batches)
    score = torch.as_tensor(score).item()
    return (
        None if abs(score - mean) < 1e-5 else f"the mean over the batches is {mean:.4f}, the function says {score:.4f}"
    )

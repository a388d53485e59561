"""The exercises of lesson 05, SFT with TRL: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (Gaussian noise for NEFTune, fixed warm-ups, rows counted instead of steps) and
from bug reports of transformers and trl (mean of micro-batch means, clipping in the wrong place, ends that are cut off).
"""

import copy
import math

import torch
from torch import nn

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.methods import packing, schedules, truncation
from finetune_lab.methods import update as updates
from finetune_lab.methods.loss import sft_loss
from finetune_lab.methods.loss_scaling import DynamicScaler
from finetune_lab.methods.neftune import neftune_noise

IGNORE = -100

# 05.1 update


def window_cases(draw):
    """Micro-batches of different shapes and shares of labels; the first label of each row counts for nobody."""
    for clip in (1e9, 0.05, 0.02):
        vocab, width = draw.sizes(1, 11, 17)[0]
        model = nn.Sequential(nn.Embedding(vocab, width), nn.Linear(width, vocab))
        for parameter in model.parameters():
            parameter.data = draw.normal(*parameter.shape)
        windows = []
        for _ in range(2):
            window = []
            for kept, (rows, length) in zip((2, 5), draw.sizes(2, 4, 9), strict=True):
                ids = draw.ints(0, vocab, rows, length)
                labels = ids.clone()
                labels[:, 1:-kept] = IGNORE
                window.append((ids, labels))
            windows.append(window)
        yield case(model=model, windows=windows, clip=clip)


def two_updates(fn, model, windows, clip):
    """Two updates with SGD: what is returned, and the weights after each. `fn` gets a function, as lesson 05 gives it one."""
    model = copy.deepcopy(model)

    def logits(ids):
        return model(ids)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    seen = {}
    for n, window in enumerate(windows, 1):
        loss, norm = fn(logits, optimizer, window, clip)
        seen[f"loss of update {n}"], seen[f"norm of update {n}"] = float(loss), float(norm)
        seen[f"weights after update {n}"] = [p.detach().clone() for p in model.parameters()]
    return seen


def one_update(loss_of=None, count=None, each=None, end=None, report=None):
    """`update` with one mistake."""

    def update(model, optimizer, window, clip):
        counted = count or (lambda labels: int((labels[:, 1:] != IGNORE).sum()))
        items = sum(counted(labels) for _, labels in window)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        total = 0.0
        for ids, labels in window:
            loss = loss_of(model(ids), labels, len(window)) if loss_of else sft_loss(model(ids), labels, items)
            loss.backward()
            total += loss.item()
            if each:
                each(optimizer, trained, clip)
        if end:
            return total, end(optimizer, trained, clip)
        norm = nn.utils.clip_grad_norm_(trained, clip)
        norm = report(trained) if report else norm.item()
        optimizer.step()
        optimizer.zero_grad()
        return total, norm

    return update


def mean_of_means(logits, labels, windows):
    return sft_loss(logits, labels) / windows


def sum_of_means(logits, labels, windows):
    return sft_loss(logits, labels)


def plain_sum(logits, labels, windows):
    return sft_loss(logits, labels, num_items=1)


def clip_after_step(optimizer, trained, clip):
    optimizer.step()
    norm = nn.utils.clip_grad_norm_(trained, clip).item()
    optimizer.zero_grad()
    return norm


def never_zero(optimizer, trained, clip):
    norm = nn.utils.clip_grad_norm_(trained, clip).item()
    optimizer.step()
    return norm


def by_value(optimizer, trained, clip):
    norm = nn.utils.clip_grad_norm_(trained, math.inf).item()
    nn.utils.clip_grad_value_(trained, clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def each_tensor(optimizer, trained, clip):
    norm = nn.utils.clip_grad_norm_(trained, math.inf).item()
    for p in trained:
        nn.utils.clip_grad_norm_([p], clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def step_each(optimizer, trained, clip):
    nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    optimizer.zero_grad()


def clip_each(optimizer, trained, clip):
    nn.utils.clip_grad_norm_(trained, clip)


def zeroed_before(model, optimizer, window, clip):
    """`update` that sets the gradients to zero in front of every micro-batch: only the last one teaches."""
    items = sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in window)
    total = 0.0
    for ids, labels in window:
        optimizer.zero_grad()
        loss = sft_loss(model(ids), labels, items)
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip).item()
    optimizer.step()
    optimizer.zero_grad()
    return total, norm


def last_loss(model, optimizer, window, clip):
    items = sum(int((labels[:, 1:] != IGNORE).sum()) for _, labels in window)
    with torch.no_grad():
        last = sft_loss(model(window[-1][0]), window[-1][1], items).item()
    return last, updates.update(model, optimizer, window, clip)[1]


def divided_again(model, optimizer, window, clip):
    total, norm = updates.update(model, optimizer, window, clip)
    return total / len(window), norm


def asks_the_model(model, optimizer, window, clip):
    nn.utils.clip_grad_norm_(model.parameters(), clip)


def norm_after(trained):
    return torch.stack([p.grad.norm() for p in trained]).norm().item()


exercise(
    "05.1", "one update", updates.update, window_cases, call=two_updates, rtol=1e-4, atol=1e-5,
    wrong=[
        Wrong(one_update(loss_of=mean_of_means), "this is the mean of the micro-batches' means: a token of a small "
              "micro-batch weighs more; count the labelled tokens of the whole window first and pass num_items"),
        Wrong(one_update(loss_of=sum_of_means), "each micro-batch is divided by its own tokens and then added: the "
              "gradient is as many times too large as there are micro-batches"),
        Wrong(one_update(loss_of=plain_sum), "nothing is divided: pass the number of labelled tokens as num_items"),
        Wrong(one_update(count=lambda labels: int((labels != IGNORE).sum())), "the first label of a row never counts, as "
              "no token stands in front of it: count labels[:, 1:]"),
        Wrong(one_update(count=lambda labels: labels[:, 1:].numel()), "masked labels are counted as well: N is the number "
              "of labels that are not -100"),
        Wrong(one_update(end=clip_after_step), "the step takes unclipped gradients: clip first, then step"),
        Wrong(one_update(end=never_zero), "the gradients are never set to zero: the next window starts with this one's"),
        Wrong(one_update(end=by_value), "clip the norm of all gradients together, not each number of them"),
        Wrong(one_update(end=each_tensor), "one norm over all parameters together: clipping each tensor alone turns the "
              "direction of the step"),
        Wrong(one_update(each=step_each), "one step for the whole window, after all of its micro-batches"),
        Wrong(one_update(each=clip_each), "clip once, when all micro-batches have added their gradients"),
        Wrong(one_update(report=norm_after), "return the norm before clipping: clip_grad_norm_ returns exactly that"),
        Wrong(zeroed_before, "zero_grad stands inside the loop: only the last micro-batch's gradient is left"),
        Wrong(last_loss, "this is the loss of the last micro-batch: add up those of the whole window"),
        Wrong(divided_again, "the loss is divided twice: with num_items the micro-batches' losses add up to the mean"),
        Wrong(asks_the_model, "model is any function from ids to logits, it need not have parameters(): take those of "
              "optimizer.param_groups"),
    ],
)  # fmt: skip


# 05.2 cosine


def schedule_cases(draw):
    for steps, warmup in ((draw.randint(40, 60), draw.randint(5, 9)), (draw.randint(20, 30), 0)):
        for step in (0, 1, warmup, warmup + 1, steps // 2, steps - 1):
            yield case(step, steps, warmup)
    yield case(3, 10, 12)


def shaped(rise=None, progress=None, fall=None):
    """`cosine` with one mistake."""

    def schedule(step, steps, warmup):
        if step < warmup:
            return rise(step, steps, warmup) if rise else step / warmup
        way = progress(step, steps, warmup) if progress else (step - warmup) / max(steps - warmup, 1)
        return fall(way) if fall else max(0.0, (1 + math.cos(math.pi * way)) / 2)

    return schedule


def no_warmup_divides(step, steps, warmup):
    return step / warmup if step <= warmup else schedules.cosine(step, steps, warmup)


exercise(
    "05.2", "cosine with warm-up", schedules.cosine, schedule_cases, rtol=1e-6, atol=1e-9,
    wrong=[
        Wrong(shaped(rise=lambda step, steps, warmup: (step + 1) / warmup), "transformers counts from 0: the share of the "
              "first step is 0 / warmup"),
        Wrong(shaped(rise=lambda step, steps, warmup: step / steps), "the rise ends after `warmup` steps: divide by it"),
        Wrong(shaped(progress=lambda step, steps, warmup: step / steps), "the cosine begins where the warm-up ends: take "
              "warmup off the step and off the length"),
        Wrong(shaped(progress=lambda step, steps, warmup: (step - warmup) / steps), "the way down has steps - warmup "
              "steps, not steps"),
        Wrong(shaped(fall=lambda way: 1 - way), "this is the linear schedule: half a cosine is asked for"),
        Wrong(shaped(fall=lambda way: math.cos(math.pi * way / 2)), "a quarter of a wave: (1 + cos(pi p)) / 2 is flat at "
              "both ends"),
        Wrong(shaped(fall=lambda way: (1 + math.cos(way)) / 2), "the angle goes from 0 to pi"),
        Wrong(shaped(progress=lambda step, steps, warmup: (step - warmup) / max(steps - 1 - warmup, 1)), "the last step is "
              "not 0 in transformers: the way down has steps - warmup steps, and 0 would come one step after the last"),
        Wrong(shaped(fall=lambda way: (1 - math.cos(math.pi * way)) / 2), "this rises: the sign of the cosine is turned"),
        Wrong(no_warmup_divides, "without a warm-up this divides by 0: the straight line is for step < warmup alone"),
        Wrong(shaped(fall=lambda way: math.cos(math.pi * way)), "this goes down to -1: shift and halve it"),
    ],
)  # fmt: skip


# 05.3 steps of a run

exercise(
    "05.3", "how long is the run", 189, name="run_steps",
    wrong=[
        Wrong(188, "each epoch has a last, smaller window of its own: round up for each epoch, then multiply"),
        Wrong(187, "the last, smaller window of each epoch is used as well: round up for each epoch, then multiply by 3"),
        Wrong(187.5, "half a step cannot be taken: round up for each epoch"),
        Wrong(186, "the last, smaller window of an epoch is used as well: round up"),
        Wrong(750, "four micro-batches make one step: divide by the accumulation too"),
        Wrong(3000, "these are samples, not steps: one step takes 4 x 4 of them"),
        Wrong(63, "this is one epoch of three"),
    ],
)  # fmt: skip


# 05.4 token efficiency


def row_cases(draw):
    for width in (None, 64, None):
        lengths = [draw.randint(3, 20) for _ in range(9)]
        order = draw.sample(range(9), 9)
        yield case(lengths, [order[:2], order[2:5], order[5:]], width)


def efficiency(slots, real=None):
    def token_efficiency(lengths, rows, width=None):
        used = sum(lengths[i] for row in rows for i in row) if real is None else real(lengths, rows)
        return used / slots(lengths, rows, width)

    return token_efficiency


def padded(lengths, rows, width):
    return sum(width or len(row) * max(lengths[i] for i in row) for row in rows)


def mean_of_rows(lengths, rows, width=None):
    each = [sum(lengths[i] for i in row) / (width or len(row) * max(lengths[i] for i in row)) for row in rows]
    return sum(each) / len(each)


exercise(
    "05.4", "token efficiency", packing.token_efficiency, row_cases,
    wrong=[
        Wrong(mean_of_rows, "the mean of the rows' efficiencies lets a short batch weigh as much as a long one: add all real "
              "tokens, add all computed ones, divide once"),
        Wrong(efficiency(lambda lengths, rows, width: sum(len(row) for row in rows) * (width or max(lengths))),
              "a batch is padded to its own longest sample, and a packed row holds several samples in one width"),
        Wrong(efficiency(lambda lengths, rows, width: sum(width or max(lengths[i] for i in row) for row in rows)),
              "a padded batch has as many rows as samples: multiply by len(row)"),
        Wrong(efficiency(lambda lengths, rows, width: sum(len(row) * (width or max(lengths[i] for i in row)) for row in rows)),
              "with a width, a whole list of samples shares one row of that width"),
        Wrong(efficiency(padded, lambda lengths, rows: padded(lengths, rows, None) - sum(lengths)),
              "this is the share of padding: the other part is asked for"),
        Wrong(efficiency(lambda lengths, rows, width: padded(lengths, rows, None)), "width is ignored: where it is given, "
              "every row has exactly that many slots"),
        Wrong(lambda lengths, rows, width=None: sum(map(sum, rows)) / sum(width or len(row) * max(row) for row in rows),
              "rows hold indices, not lengths: look each one up, lengths[i]"),
        Wrong(lambda lengths, rows, width=None: padded(lengths, rows, width) / sum(lengths),
              "upside down: real tokens over computed tokens, at most 1"),
    ],
)  # fmt: skip


# 05.5 what is cut off


def label_cases(draw):
    for limit in (7, 10, 12):
        rows = [[IGNORE] * prompt + draw.ints(0, 50, answer).tolist() for prompt, answer in
                ((3, 4), (6, 4), (8, 5), (12, 3), (9, 1), (10, 1), (6, 1), (11, 1), (7, 1))]  # fmt: skip
        rows += [[7, IGNORE, 8, 9], [5] + [IGNORE] * 13, [4] + [IGNORE] * 8 + [3, 2], [IGNORE] * 4 + [6] + [IGNORE] * 9]
        draw.shuffle(rows)
        yield case(rows, limit)


def sorting(kept=None, lost=None, name=None):
    """`cut_report` with one mistake."""

    def cut_report(rows, max_length):
        report = {"whole": 0, "cut": 0, "empty": 0}
        for labels in rows:
            have = (kept or (lambda labels, n: sum(i != IGNORE for i in labels[1:n])))(labels, max_length)
            gone = (lost or (lambda labels, n: sum(i != IGNORE for i in labels[max(n, 1) :])))(labels, max_length)
            report[name(have, gone) if name else "empty" if not have else "cut" if gone else "whole"] += 1
        return report

    return cut_report


exercise(
    "05.5", "what is cut off", truncation.cut_report, label_cases,
    wrong=[
        Wrong(sorting(kept=lambda labels, n: sum(i != IGNORE for i in labels[:n])), "the first label of a row never counts: "
              "there is no token in front of it that could predict it"),
        Wrong(sorting(lost=lambda labels, n: len(labels) > n), "a row that loses only masked tokens is whole: look at the "
              "labels that are cut off"),
        Wrong(sorting(name=lambda have, gone: "cut" if gone else "whole"), "a row that keeps no label is not cut but empty: "
              "it teaches nothing"),
        Wrong(sorting(name=lambda have, gone: "cut" if gone else "empty" if not have else "whole"), "a row that loses all of "
              "its labels is empty, not cut: look at what is kept first"),
        Wrong(sorting(kept=lambda labels, n: sum(i != IGNORE for i in labels[1 : n + 1]),
                      lost=lambda labels, n: sum(i != IGNORE for i in labels[n + 1 :])),
              "one token too many is kept: labels[:max_length] has max_length tokens"),
        Wrong(sorting(kept=lambda labels, n: sum(i != IGNORE for i in labels[1 : n - 1]),
                      lost=lambda labels, n: sum(i != IGNORE for i in labels[n - 1 :])),
              "one token too few is kept: labels are not shifted here, max_length tokens stay"),
        Wrong(sorting(kept=lambda labels, n: sum(i != IGNORE for i in labels[1:][-n:]),
                      lost=lambda labels, n: sum(i != IGNORE for i in labels[1:][:-n])),
              "the end of the row is cut off, not its beginning"),
        Wrong(sorting(kept=lambda labels, n: min(n, len(labels)), lost=lambda labels, n: max(0, len(labels) - n)),
              "count labels that are not -100, not tokens: a prompt alone teaches nothing"),
    ],
)  # fmt: skip


# 05.6 the dynamic scale


def scaler_cases(draw):
    for interval in (3, 4):
        forced = [False] * (2 * interval + 1) + [True] + [False] * (interval - 1) + [True, False, True]
        yield case(interval=interval, overflows=forced + [False] * (interval + 1))
        yield case(interval=interval, overflows=[draw.random() < 0.2 for _ in range(25)])


def scales(cls, interval, overflows):
    """The scale after each step."""
    scaler = cls(scale=1024.0, growth=3.0, backoff=0.25, interval=interval)
    seen = []
    for overflow in overflows:
        scaler.update(overflow)
        seen.append(float(scaler.scale))
    return seen


def scaler(rule):
    """`DynamicScaler` with another rule."""

    class Scaler(DynamicScaler):
        def update(self, overflow):
            rule(self, overflow)

    return Scaler


def keeps_counting(s, overflow):
    if overflow:
        s.scale *= s.backoff
        return
    s.good_steps += 1
    if s.good_steps == s.interval:
        s.scale, s.good_steps = s.scale * s.growth, 0


def counts_overflows(s, overflow):
    if overflow:
        s.scale *= s.backoff
    s.good_steps += 1
    if s.good_steps == s.interval:
        s.scale, s.good_steps = s.scale * s.growth, 0


def never_grows(s, overflow):
    if overflow:
        s.scale *= s.backoff


def grows_each_step(s, overflow):
    s.scale *= s.backoff if overflow else s.growth


def grows_once(s, overflow):
    if overflow:
        s.scale, s.good_steps = s.scale * s.backoff, 0
        return
    s.good_steps += 1
    if s.good_steps == s.interval:
        s.scale *= s.growth


def grows_on_and_on(s, overflow):
    if overflow:
        s.scale, s.good_steps = s.scale * s.backoff, 0
        return
    s.good_steps += 1
    if s.good_steps >= s.interval:
        s.scale *= s.growth


def one_late(s, overflow):
    if overflow:
        s.scale, s.good_steps = s.scale * s.backoff, 0
        return
    if s.good_steps == s.interval:
        s.scale, s.good_steps = s.scale * s.growth, 0
    s.good_steps += 1


def above(s, overflow):
    if overflow:
        s.scale, s.good_steps = s.scale * s.backoff, 0
        return
    s.good_steps += 1
    if s.good_steps > s.interval:
        s.scale, s.good_steps = s.scale * s.growth, 0


def goes_on(s, overflow):
    if overflow:
        s.scale, s.good_steps = s.scale * s.backoff, 0
    s.good_steps += 1
    if s.good_steps == s.interval:
        s.scale, s.good_steps = s.scale * s.growth, 0


def fixed(s, overflow):
    s.growth, s.backoff = 2.0, 0.5
    DynamicScaler.update(s, overflow)


def wrong_way(s, overflow):
    DynamicScaler.update(s, not overflow)


def divides(s, overflow):
    if overflow:
        s.scale, s.good_steps = s.scale / s.growth, 0
        return
    DynamicScaler.update(s, False)


exercise(
    "05.6", "the dynamic scale", DynamicScaler, scaler_cases, call=scales,
    wrong=[
        Wrong(scaler(keeps_counting), "an overflow starts the count of good steps anew: `interval` of them in a row"),
        Wrong(scaler(counts_overflows), "a step with an overflow is no good step, and it starts the count anew"),
        Wrong(scaler(never_grows), "the scale only falls: after `interval` good steps it grows"),
        Wrong(scaler(grows_each_step), "it grows after `interval` good steps in a row, not after each"),
        Wrong(scaler(grows_once), "set good_steps back to 0 when the scale grows, or it never grows again"),
        Wrong(scaler(grows_on_and_on), "set good_steps back to 0 when the scale grows, or it grows at every step from then on"),
        Wrong(scaler(one_late), "one step late: count this step first, then compare with the interval"),
        Wrong(scaler(above), "`>` waits for one good step too many: it grows when good_steps equals interval"),
        Wrong(scaler(goes_on), "return after an overflow: here that step is counted as the first good one"),
        Wrong(scaler(fixed), "use self.growth and self.backoff, not always 2 and 0.5"),
        Wrong(scaler(wrong_way), "the other way round: an overflow means that the scale is too large"),
        Wrong(scaler(divides), "after an overflow multiply by backoff; growth is for the good times"),
    ],
)  # fmt: skip


# 05.7 NEFTune's noise


def embedding_cases(draw):
    for alpha, dtype, (length, width) in zip(
        (5.0, 15.0, 5.0), (torch.float32, torch.float32, torch.float64), draw.sizes(3, 60, 90), strict=True
    ):
        yield case(draw.normal(3, length, width, dtype=dtype) + 2, alpha)


def statistics(fn, embeddings, alpha):
    """The noise's size against alpha / sqrt(L d), its spread, and its form."""
    torch.manual_seed(0)
    noise = fn(embeddings, alpha)
    bound = alpha / math.sqrt(embeddings.shape[1] * embeddings.shape[2])
    return {
        "shape": tuple(noise.shape),
        "dtype": str(noise.dtype),
        "mean / bound": round(noise.mean().item() / bound, 1) + 0.0,
        "largest / bound": noise.abs().max().item() / bound,
        "standard deviation / bound": noise.std().item() / bound,
        "other rows have other noise": not torch.equal(noise[0], noise[1]),
        "other tokens have other noise": not torch.equal(noise[:, 0], noise[:, 1]),
        "other entries of a token have other noise": not torch.equal(noise[..., 0], noise[..., 1]),
    }


def noise_of(bound=None, make=None):
    """`neftune_noise` with one mistake."""

    def neftune_noise(embeddings, alpha):
        _, length, width = embeddings.shape
        b = bound(embeddings, alpha) if bound else alpha / math.sqrt(length * width)
        return make(embeddings, b) if make else torch.zeros_like(embeddings).uniform_(-b, b)

    return neftune_noise


def one_row(embeddings, b):
    return torch.zeros_like(embeddings[:1]).uniform_(-b, b).expand_as(embeddings)


exercise(
    "05.7", "the noise of NEFTune", neftune_noise, embedding_cases, call=statistics, rtol=0.03, atol=0.03,
    wrong=[
        Wrong(noise_of(make=lambda e, b: torch.randn_like(e) * b), "this is Gaussian, as in the notes' code: its spread is "
              "sqrt(3) times too large, and it has no bound; the paper draws uniform numbers"),
        Wrong(noise_of(bound=lambda e, a: math.sqrt(a**2 / math.sqrt(e.shape[1] * e.shape[2])),
                       make=lambda e, b: torch.randn_like(e) * b),
              "alpha^2 / sqrt(L d) is the variance of the notes' formula: dozens of times too much noise, and Gaussian"),
        Wrong(noise_of(make=lambda e, b: torch.rand_like(e) * b), "the noise lies in (-1, 1) times the bound, not in (0, 1)"),
        Wrong(noise_of(bound=lambda e, a: a / (e.shape[1] * e.shape[2])), "the root is missing: alpha / sqrt(L d)"),
        Wrong(noise_of(bound=lambda e, a: a / math.sqrt(e.numel())), "L is the length of one sequence: the batch does not "
              "stand under the root"),
        Wrong(noise_of(bound=lambda e, a: a / math.sqrt(e.shape[2])), "the length L is missing under the root"),
        Wrong(noise_of(bound=lambda e, a: 5 / math.sqrt(e.shape[1] * e.shape[2])), "alpha is an argument, not always 5"),
        Wrong(noise_of(make=lambda e, b: e + torch.zeros_like(e).uniform_(-b, b)), "return the noise alone; the caller adds it"),
        Wrong(noise_of(make=lambda e, b: torch.zeros_like(e[..., :1]).uniform_(-b, b).expand_as(e).clone()),
              "one number a token is not enough: every entry has its own noise"),
        Wrong(noise_of(make=lambda e, b: torch.zeros_like(e[:, :1]).uniform_(-b, b).expand_as(e).clone()),
              "all tokens of a sequence share one noise: draw for every token too"),
        Wrong(noise_of(make=lambda e, b: (torch.rand_like(e) - 0.5) * b), "rand - 0.5 reaches only half of the bound: "
              "2 * rand - 1 lies in (-1, 1)"),
        Wrong(noise_of(make=one_row), "all rows of the batch share one noise: draw for every entry"),
    ],
)  # fmt: skip

"""The exercises of lesson 01, loss masking: what people get wrong, and the hint for each mistake.

The wrong answers come from public notes (a single answer start for a batch, an unused attention mask) and from bug
reports of trl, axolotl, LLaMA-Factory and transformers (lost end-of-turn labels, last turn only, mean of means).
"""

import torch
import torch.nn.functional as F

from finetune_lab.course.checks import Wrong, case, exercise
from finetune_lab.methods import chat, loss, packing

IGNORE = -100


def words_to_ids(text: str) -> list[int]:
    """A tokenizer for the checks: texts are numbers in words."""
    return [int(word) for word in text.split()]


def a_format(draw) -> chat.ChatFormat:
    """A chat format of other ids than the tiny model's, with several tokens where it has one."""
    ids = draw.sample(range(100, 200), 9)
    begin, mark = tuple(ids[:1]), ids[8]
    before = {"system": (ids[1],), "user": (ids[2], mark), "assistant": (ids[3], mark)}
    return chat.ChatFormat(begin, begin + (ids[4],), before, (ids[5],), (ids[6],))


def talk(draw, turns: int, system: bool) -> list[dict]:
    roles = ["system"] * system + ["user", "assistant"] * turns
    return [
        {"role": r, "content": " ".join(str(draw.randint(1, 99)) for _ in range(draw.randint(1, 4)))} for r in roles
    ]


# 01.1 render_chat


def chat_cases(draw):
    for turns, system, prompt in ((1, False, False), (2, True, False), (1, True, True), (3, False, True)):
        messages = talk(draw, turns, system)
        yield case(messages[:-1] if prompt else messages, a_format(draw), words_to_ids, prompt)
    yield case([{"role": "tool", "content": "1"}], a_format(draw), words_to_ids, False)


def rendered(keep_end=True, span_mark=False, span_end=True, always_prompt=False, begin_each=False, gap_in_span=False,
             has_system=None, keep_gap=True, row=list):  # fmt: skip
    """`render_chat` with one mistake."""

    def render_chat(messages, fmt, encode, add_generation_prompt=False):
        for message in messages:
            if message["role"] not in fmt.before:
                raise ValueError("unknown role")
        system = messages[0]["role"] == "system" if has_system is None else has_system
        ids, spans = row(fmt.begin if system else fmt.begin_default), []
        for n, message in enumerate(messages):
            if begin_each and n:
                ids += fmt.begin
            mark = len(ids)
            ids += fmt.before[message["role"]]
            start = mark if span_mark else len(ids)
            ids += encode(message["content"])
            stop = len(ids)
            ids += fmt.end if keep_end else ()
            stop = len(ids) if span_end else stop
            ids += fmt.gap if keep_gap else ()
            spans.append((message["role"], start, len(ids) if gap_in_span else stop))
        if add_generation_prompt or always_prompt:
            ids += fmt.before["assistant"]
        return ids, spans

    return render_chat


def prompt_never(messages, fmt, encode, add_generation_prompt=False):
    return chat.render_chat(messages, fmt, encode, False)


exercise(
    "01.1", "render a conversation", chat.render_chat, chat_cases,
    wrong=[
        Wrong(rendered(keep_end=False), "fmt.end is missing behind the texts: the model would never see a turn end"),
        Wrong(rendered(span_mark=True), "a span starts behind the role mark: the mark is the template's, nobody said it"),
        Wrong(rendered(span_end=False), "a span includes fmt.end: whoever speaks must learn to stop"),
        Wrong(rendered(gap_in_span=True), "fmt.gap lies between the turns: it belongs to no span"),
        Wrong(rendered(keep_gap=False), "fmt.gap is missing: it stands behind each fmt.end (some formats leave it empty)"),
        Wrong(rendered(row=tuple), "the fields of fmt are tuples, encode gives a list, and a tuple cannot grow by a list: "
              "begin with ids = list(...)"),
        Wrong(rendered(always_prompt=True), "add the assistant's mark at the end only when add_generation_prompt is true: "
              "training data ends with the last turn"),
        Wrong(prompt_never, "add_generation_prompt=True must end with fmt.before['assistant']: else the model continues "
              "the user's turn"),
        Wrong(rendered(begin_each=True), "fmt.begin stands once, in front of the first message (two bos tokens are a "
              "classic bug)"),
        Wrong(rendered(has_system=False), "a conversation that opens with a system message starts with fmt.begin, not "
              "with fmt.begin_default"),
        Wrong(rendered(has_system=True), "a conversation without a system message starts with fmt.begin_default: some "
              "templates put a system message of their own there"),
    ],
)  # fmt: skip


# 01.2 completion_labels


def completion_cases(draw):
    for prompt, answer in draw.sizes(4, 2, 9):
        ids = [draw.randint(1, 99) for _ in range(prompt + answer)]
        yield case(ids[:prompt], ids)
    yield case([7, 8, 5], [7, 8, 9, 4, 3])  # the last prompt token merged with the answer's first letters
    yield case([1, 2, 3], [1, 9, 3, 4])  # they agree again behind the border: it is an answer all the same
    yield case([5, 6, 7, 8], [5, 4, 7, 8])  # up to the very end
    yield case([1, 2, 3], [1, 2, 3, 2, 5])  # the answer uses an id of the prompt


def shifted_labels(prompt_ids, ids):
    return chat.completion_labels(prompt_ids, ids)[1:] + [IGNORE]


def zero_labels(prompt_ids, ids):
    return [0 if label == IGNORE else label for label in chat.completion_labels(prompt_ids, ids)]


def no_last_label(prompt_ids, ids):
    return chat.completion_labels(prompt_ids, ids)[:-1] + [IGNORE]


def one_too_many(prompt_ids, ids):
    labels = chat.completion_labels(prompt_ids, ids)
    start = sum(label == IGNORE for label in labels)
    return [IGNORE] * (start + 1) + ids[start + 1 :]


def by_length(prompt_ids, ids):
    return [IGNORE] * len(prompt_ids) + ids[len(prompt_ids) :]


def agree_anywhere(prompt_ids, ids):
    return [IGNORE if a == b else a for a, b in zip(ids, prompt_ids, strict=False)] + ids[len(prompt_ids) :]


def in_the_prompt(prompt_ids, ids):
    return [IGNORE if token in prompt_ids else token for token in ids]


def nothing_masked(prompt_ids, ids):
    return list(ids)


def answer_only(prompt_ids, ids):
    return [label for label in chat.completion_labels(prompt_ids, ids) if label != IGNORE]


exercise(
    "01.2", "completion labels", chat.completion_labels, completion_cases,
    wrong=[
        Wrong(shifted_labels, "off by one: do not shift here, the loss shifts the labels itself"),
        Wrong(zero_labels, "0 is a token id and would be learnt: the loss ignores -100"),
        Wrong(no_last_label, "the last token counts too: it is the end of the turn, and without it the model never stops"),
        Wrong(one_too_many, "the first token of the answer counts: mask up to where prompt and whole part, not beyond"),
        Wrong(by_length, "len(prompt_ids) is not always the border: the tokenizer may merge across it; compare the ids"),
        Wrong(agree_anywhere, "behind the first difference every id counts, also where the two agree again: stop there"),
        Wrong(in_the_prompt, "an answer may use ids that the prompt has too: compare place by place, from the start"),
        Wrong(nothing_masked, "nothing is masked: the prompt's labels must be -100"),
        Wrong(answer_only, "labels are as long as ids: masked places stay, as -100"),
    ],
)  # fmt: skip


# 01.3 sft_loss


def loss_cases(draw):
    for num_items, (rows, length) in zip((None, 17, None), draw.sizes(3, 3, 8), strict=True):
        vocab = draw.randint(9, 13)
        labels = draw.ints(0, vocab, rows, length)
        labels[:, : length // 2] = IGNORE
        labels[0, :-1] = IGNORE  # rows with different numbers of labels
        yield case(3 * draw.normal(rows, length, vocab, dtype=torch.float32), labels, num_items)
    yield case(draw.normal(2, 5, 7, dtype=torch.bfloat16), draw.ints(0, 7, 2, 5), None)
    yield case(draw.normal(2, 5, 7), draw.ints(0, 7, 2, 5), 40)


def loss_of(scores, targets, num_items):
    total = F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / ((targets != IGNORE).sum() if num_items is None else num_items)


def no_shift(logits, labels, num_items=None):
    return loss_of(logits, labels, num_items)


def shift_back(logits, labels, num_items=None):
    return loss_of(logits[:, 1:], labels[:, :-1], num_items)


def shift_two(logits, labels, num_items=None):
    return loss_of(logits[:, :-2], labels[:, 2:], num_items)


def per_position(logits, labels, num_items=None):
    scores, targets = logits[:, :-1].float(), labels[:, 1:]
    total = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (targets.numel() if num_items is None else num_items)


def per_batch_mean(logits, labels, num_items=None):
    return loss_of(logits[:, :-1], labels[:, 1:], None)


def per_sequence(logits, labels, num_items=None):
    return loss.sequence_mean_loss(logits, labels)


def token_sum(logits, labels, num_items=None):
    return loss_of(logits[:, :-1], labels[:, 1:], 1)


def half_precision(logits, labels, num_items=None):
    scores, targets = logits[:, :-1], labels[:, 1:]
    total = F.cross_entropy(scores.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / ((targets != IGNORE).sum() if num_items is None else num_items)


exercise(
    "01.3", "the loss", loss.sft_loss, loss_cases,
    wrong=[
        Wrong(no_shift, "the shift is missing: logits at position t predict token t+1; use shift(logits, labels)"),
        Wrong(shift_back, "shifted the wrong way: drop the last logits and the first label"),
        Wrong(shift_two, "shifted twice: labels arrive unshifted, shift them once"),
        Wrong(per_position, "you divide by all positions: divide by the labelled ones, targets != -100"),
        Wrong(per_batch_mean, "num_items is ignored: when it is given, divide by it and by nothing else"),
        Wrong(per_sequence, "this is the mean of sequence means: sum over all tokens first, divide once"),
        Wrong(token_sum, "this is the sum: divide it by num_items, or by the number of labelled tokens"),
        Wrong(half_precision, "take the logits to fp32 before the loss: bf16 keeps only about three digits"),
    ],
)  # fmt: skip


# 01.4 assistant_labels


def turn_cases(draw):
    for turns, system in ((1, False), (2, True), (3, False), (3, True)):
        ids, spans = chat.render_chat(talk(draw, turns, system), a_format(draw), words_to_ids)
        yield case(ids, spans)


def spoken(keep, shorten=0):
    """Labels of the spans that `keep(role, is_last_assistant)` chooses, `shorten` tokens cut off the end."""

    def assistant_labels(ids, spans):
        labels = [IGNORE] * len(ids)
        last = max(i for i, span in enumerate(spans) if span[0] == "assistant")
        for i, (role, start, stop) in enumerate(spans):
            if keep(role, i == last):
                labels[start : stop - shorten] = ids[start : stop - shorten]
        return labels

    return assistant_labels


def from_first_answer(ids, spans):
    start = next(span[1] for span in spans if span[0] == "assistant")
    return [IGNORE] * start + list(ids[start:])


def zeros_outside(ids, spans):
    return [0 if label == IGNORE else label for label in chat.assistant_labels(ids, spans)]


exercise(
    "01.4", "labels for many turns", chat.assistant_labels, turn_cases,
    wrong=[
        Wrong(spoken(lambda role, last: last), "only the last answer counts: this is what a search for one response "
              "template does; every assistant turn counts"),
        Wrong(spoken(lambda role, last: role == "assistant", shorten=1), "the end-of-turn token of each answer is "
              "masked: the span includes it for a reason, the model must learn to stop"),
        Wrong(spoken(lambda role, last: True), "user and system turns count as well: only role == 'assistant' may"),
        Wrong(spoken(lambda role, last: role != "user"), "the system message counts as well: nobody wants the model to "
              "write it"),
        Wrong(from_first_answer, "everything behind the first answer counts, later user turns included: use each span"),
        Wrong(zeros_outside, "0 is a token id and would be learnt: the loss ignores -100"),
    ],
)  # fmt: skip


# 01.5 positions_from_mask


def mask_cases(draw):
    for rows, length in draw.sizes(4, 3, 8):
        lengths = [draw.randint(1, length - 1) for _ in range(rows)]
        yield case(packing.pad_rows([[1] * n for n in lengths] + [[1] * length], 0, draw.choice(["left", "right"]))[1])
    yield case(torch.tensor([[0, 0, 1, 1, 1]]))
    yield case(torch.tensor([[1, 1, 1, 0]]))


def ignores_mask(attention_mask):
    return torch.arange(attention_mask.shape[1]).expand_as(attention_mask)


def counts_from_one(attention_mask):
    return attention_mask.long().cumsum(1)


def negative(attention_mask):
    return attention_mask.long().cumsum(1) - 1


def down_the_batch(attention_mask):
    return (attention_mask.long().cumsum(0) - 1).clamp(min=0)


exercise(
    "01.5", "positions from the mask", packing.positions_from_mask, mask_cases,
    wrong=[
        Wrong(ignores_mask, "these positions count the padding too: with left padding the first real token is not at 0"),
        Wrong(counts_from_one, "the first real token has position 0, not 1: subtract one"),
        Wrong(negative, "padding on the left gets position -1: clamp at 0"),
        Wrong(down_the_batch, "you count down the batch: positions run along the second axis"),
    ],
    # padding's position is never used, so any value from 0 on is right there
    call=lambda fn, mask: real_positions(fn(mask), mask),
)  # fmt: skip


def real_positions(positions, mask):
    """Positions with the padding's set to 0 where it is legal (not negative), so that only real tokens decide."""
    if not isinstance(positions, torch.Tensor) or positions.shape != mask.shape:
        return positions
    return torch.where((mask == 0) & (positions >= 0), torch.zeros_like(positions), positions)


# 01.6 block_diagonal_mask


def position_cases(draw):
    for rows, samples in ((1, 3), (2, 2), (3, 4)):
        lengths = [[draw.randint(1, 4) for _ in range(samples)] for _ in range(rows)]
        longest = max(map(sum, lengths))
        for row in lengths:
            row[-1] += longest - sum(row)
        yield case(torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]))
    yield case(torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]]))


def blocks(position_ids):
    sample = (position_ids == 0).cumsum(1)
    return sample[:, :, None] == sample[:, None, :]


def no_blocks(position_ids):
    length = position_ids.shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril().expand(len(position_ids), 1, length, length)


def not_causal(position_ids):
    return blocks(position_ids)[:, None]


def forbidden(position_ids):
    return ~packing.block_diagonal_mask(position_ids)


def no_head_axis(position_ids):
    return packing.block_diagonal_mask(position_ids)[:, 0]


def future(position_ids):
    return (blocks(position_ids) & torch.ones_like(blocks(position_ids)).triu())[:, None]


def not_itself(position_ids):
    return (blocks(position_ids) & torch.ones_like(blocks(position_ids)).tril(-1))[:, None]


def by_position(position_ids):
    smaller = position_ids[:, None, :] <= position_ids[:, :, None]
    return (smaller & torch.ones_like(smaller).tril())[:, None]


exercise(
    "01.6", "who may see whom in a packed row", packing.block_diagonal_mask, position_cases,
    wrong=[
        Wrong(no_blocks, "a plain causal mask: samples still see the ones packed in front of them"),
        Wrong(not_causal, "inside a sample the future is visible: keep only j <= i (tril)"),
        Wrong(forbidden, "inverted: True means allowed to attend"),
        Wrong(no_head_axis, "the shape is (batch, 1, seq, seq): the axis of the heads is missing"),
        Wrong(future, "the wrong triangle: row i attends to columns j <= i"),
        Wrong(not_itself, "a token must see itself: keep the diagonal (a first token would see nothing)"),
        Wrong(by_position, "comparing positions does not tell samples apart: position 1 of one sample would see "
              "position 0 of another; number the samples first"),
    ],
)  # fmt: skip


# 01.7 labelled_only_loss


def head_cases(draw):
    for num_items, (rows, length) in zip((None, 23, None), draw.sizes(3, 4, 9), strict=True):
        width, vocab = draw.randint(3, 5), draw.randint(11, 15)
        labels = draw.ints(0, vocab, rows, length)
        labels[:, : length // 2] = IGNORE
        hidden = draw.normal(rows, length, width).requires_grad_()
        yield case(hidden, draw.normal(vocab, width), labels, num_items)
    yield case(draw.normal(2, 6, 3).requires_grad_(), draw.normal(9, 3), draw.ints(0, 9, 2, 6), 31)


def value_and_gradient(fn, hidden, weight, labels, num_items):
    """The loss, and its gradient at the hidden states: both must equal those of full logits."""
    value = fn(hidden, weight, labels, num_items)
    return value, torch.autograd.grad(value, hidden)[0]


def selected(scores_of, targets_of, count=True):
    """`labelled_only_loss` with another way to select, or another divisor."""

    def labelled_only_loss(hidden, weight, labels, num_items=None):
        states, targets = scores_of(hidden), targets_of(labels)
        counted = targets != IGNORE
        total = F.cross_entropy(states[counted] @ weight.T, targets[counted], reduction="sum")
        return total / (counted.sum() if num_items is None or not count else num_items)

    return labelled_only_loss


def detached(hidden, weight, labels, num_items=None):
    value = loss.labelled_only_loss(hidden.detach(), weight, labels, num_items)
    return value + 0 * hidden.sum()


def not_divided(hidden, weight, labels, num_items=None):
    return loss.labelled_only_loss(hidden, weight, labels, 1)


def all_positions(hidden, weight, labels, num_items=None):
    return loss.labelled_only_loss(hidden, weight, labels, labels[:, 1:].numel() if num_items is None else num_items)


exercise(
    "01.7", "logits only where they count", loss.labelled_only_loss, head_cases, call=value_and_gradient,
    wrong=[
        Wrong(selected(lambda h: h, lambda x: x), "the shift is missing: pair hidden[t] with labels[t+1] before you select"),
        Wrong(selected(lambda h: h[:, 1:], lambda x: x[:, :-1]), "shifted the wrong way: drop the last state and the first "
              "label"),
        Wrong(selected(lambda h: h[:, :-1], lambda x: x[:, 1:], count=False), "num_items is ignored: when it is given, "
              "divide by it and by nothing else"),
        Wrong(not_divided, "this is the sum: divide it by num_items, or by the number of counted positions"),
        Wrong(all_positions, "you divide by all positions: divide by the counted ones"),
        Wrong(detached, "the value is right but no gradient reaches the hidden states: do not detach them"),
    ],
)  # fmt: skip

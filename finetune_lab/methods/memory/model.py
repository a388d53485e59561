"""One decoder's forward pass, written down as transformers runs it: the same operations, the same local variables.

A local that a function still holds is memory, so the names and their scopes follow transformers 5.23
(`modeling_llama.py` and its relatives) and peft 0.21 (`lora/layer.py`, `lora/dora.py`, `lora/bnb.py`).
Leaves out: sliding-window masks, KV caches. Runs on `Value`s: bytes, no data.
"""

from finetune_lab.methods.memory import heads
from finetune_lab.methods.memory import operations as op
from finetune_lab.methods.memory.adapters import adapted_linear
from finetune_lab.methods.memory.architecture import Architecture
from finetune_lab.methods.memory.experts import experts
from finetune_lab.methods.memory.recipe import DTYPES, Recipe
from finetune_lab.methods.memory.states import targets
from finetune_lab.methods.memory.tape import Tape
from finetune_lab.methods.memory.values import Value


class Decoder:
    """A model of `layers` layers on a tape, `batch` sequences; call `loss()` and then `tape.backward(...)`.

    frozen: nothing is trained and no gradient flows (a reference or reward model, `torch.no_grad`).
    """

    def __init__(
        self, tape: Tape, architecture: Architecture, recipe: Recipe, layers: int, batch: int, frozen: bool = False
    ) -> None:
        self.tape, self.a, self.r, self.layers = tape, architecture, recipe, layers
        self.batch, self.seq, self.frozen = batch, recipe.seq, frozen
        self.rows = batch * recipe.seq
        self.full = not recipe.adapts
        self.base = DTYPES[recipe.dtype]
        self.rest = 4 if recipe.quantised and recipe.kbit_fp32 else self.base
        self.adapted = {linear.name for linear in targets(architecture, recipe)}
        self.weights: dict[tuple, Value] = {}

    def weight(self, name: str, n: int, size: int, trained: bool) -> Value:
        """The parameter `name` of the current place, made when first asked for."""
        key = (self.tape.place, name)
        if key not in self.weights:
            self.weights[key] = self.tape.parameter(n, size, trained and not self.frozen)
        return self.weights[key]

    def norm(self, x: Value, name: str, width: int) -> Value:
        """RMSNorm over the last `width` numbers: computed in fp32 on a copy."""
        tape, rows, size = self.tape, x.n // width, x.size
        weight = self.weight(name, width, self.rest, self.full)

        def gemma(x: Value) -> Value:
            return op.mul(tape, x, op.rsqrt(tape, op.shift(tape, op.mean(tape, op.power(tape, x), rows))))

        if self.a.traits.gemma:
            output = gemma(op.to(tape, x, 4))
            output = op.mul(tape, output, op.shift(tape, op.to(tape, weight, 4)))
            return op.to(tape, output, size)
        x = op.to(tape, x, 4)
        variance = op.mean(tape, op.power(tape, x), rows)
        x = op.mul(tape, x, op.rsqrt(tape, op.shift(tape, variance)))
        return op.mul(tape, weight, op.to(tape, x, size))

    def linear(self, x: Value, name: str) -> Value:
        """The linear layer `name`, with its adapter where the recipe puts one."""
        return adapted_linear(self, x, next(linear for linear in self.a.linears() if linear.name == name))

    def rotate(self, x: Value, cos: Value, sin: Value) -> Value:
        """x cos + rotate_half(x) sin; Phi-3 rotates a part of each head and joins it with the rest."""
        tape = self.tape

        def half(x):
            x1, x2 = op.part(tape, x, x.n // 2), op.part(tape, x, x.n // 2)
            return op.cat(tape, [op.negate(tape, x2), x1])

        if not self.a.traits.fused:
            return op.add(tape, op.mul(tape, x, cos), op.mul(tape, half(x), sin))
        n = x.n * self.a.rotary_dim // self.a.head_dim
        rotated, rest = op.part(tape, x, n), op.part(tape, x, x.n - n)
        return op.cat(tape, [op.add(tape, op.mul(tape, rotated, cos), op.mul(tape, half(rotated), sin)), rest])

    def project(self, x: Value) -> tuple[Value, Value, Value]:
        """Query, key and value of all heads; the first two normed where the family does it."""
        tape, a = self.tape, self.a
        if a.traits.fused:
            joint = self.linear(x, "qkv_proj")
            widths = (a.query_width, a.kv_width, a.kv_width)
            query, key, value = (op.part(tape, joint, self.rows * width) for width in widths)
            return query, key, value
        if a.family in ("qwen3", "qwen3_moe"):
            query = self.norm(self.linear(x, "q_proj"), "q_norm", a.head_dim)
            key = self.norm(self.linear(x, "k_proj"), "k_norm", a.head_dim)
            return query, key, self.linear(x, "v_proj")
        query, key, value = (self.linear(x, f"{name}_proj") for name in "qkv")
        query = op.regrouped(tape, query) if a.heads > 1 else query
        key = op.regrouped(tape, key) if a.kv_heads > 1 else key
        if a.traits.qk_norm:
            query = self.norm(query, "q_norm", a.head_dim)
            key = self.norm(key, "k_norm", a.head_dim)
        return query, key, value

    def attention(self, x: Value, cos: Value, sin: Value, mask: Value | None) -> tuple[Value, Value | None]:
        tape, a = self.tape, self.a
        query, key, value = self.project(x)

        def rotary(query, key):
            q_embed = self.rotate(query, cos, sin)
            return q_embed, self.rotate(key, cos, sin)

        query, key = rotary(query, key)
        if self.r.attention == "eager":
            out, scores = self.eager(query, key, value, mask)
        else:
            out, scores = op.attention(tape, query, key, value, self.batch * a.heads * self.seq), None
            if (
                a.traits.fused and a.heads > 1
            ):  # joined heads lie head by head in memory, and the kernel's result like its query
                out = op.copy(tape, out)
        out = self.linear(out, "o_proj")
        return out, scores

    def eager(self, query: Value, key: Value, value: Value, mask: Value | None) -> tuple[Value, Value]:
        tape, a = self.tape, self.a
        groups, cells = a.heads // a.kv_heads, self.batch * a.heads * self.seq * self.seq
        viewed = self.batch == a.kv_heads == 1
        keys, values = (op.repeat(tape, x, groups, viewed) for x in (key, value))

        def in_heads(x, copied):  # matmul wants (batch x heads, seq, head_dim): a copy where it is no view
            return op.copy(tape, x) if copied and self.batch > 1 and a.heads > 1 else x

        joined = a.traits.fused  # Phi-3's rotation ends in a cat, which lays the heads out one after another
        scores = op.scale(
            tape, op.bmm(tape, in_heads(query, not joined), in_heads(keys, groups == 1 and not joined), cells)
        )
        if a.softcap:
            scores = op.scale(tape, scores)
            scores = op.tanh(tape, scores)
            scores = op.scale(tape, scores)
        if mask is not None:
            scores = op.add(tape, scores, mask)
        scores = op.to(tape, op.softmax(tape, scores, 4), query.size)
        out = op.bmm(tape, scores, in_heads(values, groups == 1), query.n)
        out = op.copy(tape, out) if a.heads > 1 else out
        return out, scores

    def mlp(self, x: Value) -> Value:
        tape = self.tape
        if self.a.experts:
            return experts(self, x)
        if self.a.traits.fused:
            up = self.linear(x, "gate_up_proj")
            gate, up = op.halves(tape, up)
            up = op.mul(tape, up, op.activation(tape, gate))
            return self.linear(up, "down_proj")
        return self.linear(
            op.mul(tape, op.activation(tape, self.linear(x, "gate_proj")), self.linear(x, "up_proj")), "down_proj"
        )

    def layer(self, x: Value, cos: Value, sin: Value, mask: Value | None) -> Value:
        """norm, attention, add, norm, mlp, add; Gemma 2 and 3 also norm what attention and mlp give."""
        tape, h, sandwich = self.tape, self.a.hidden, self.a.traits.norms == 4
        residual = x
        x = self.norm(x, "input_layernorm", h)
        x, _ = self.attention(x, cos, sin, mask)
        if sandwich:
            x = self.norm(x, "post_attention_layernorm", h)
        x = op.add(tape, residual, x)
        residual = x
        x = self.norm(x, "pre_feedforward_layernorm", h)
        x = self.mlp(x)
        if sandwich:
            x = self.norm(x, "post_feedforward_layernorm", h)
        x = op.add(tape, residual, x)
        return x

    def backbone(self) -> Value:
        tape, a = self.tape, self.a
        tape.place = "the embedding"
        embedding = self.weight("embed_tokens", a.vocab * a.hidden, self.rest, self.full)
        embedded = op.embedding(tape, embedding, self.rows * a.hidden)
        if a.traits.gemma:  # times sqrt(hidden), a number in the weights' dtype
            embedded = op.scaled_by(tape, embedded)
        if self.r.checkpointing and not self.frozen:  # transformers' activation_checkpointing_enable
            tape.require_gradient(embedded)
        positions = tape.new(self.seq, 8)
        # Gemma 2 and 3 make a mask for each kind of layer, Gemma 3 rotations too; one layer here stands for the kind
        # that sees everything
        kinds = 2 if a.family in ("gemma2", "gemma3_text") else 1
        mixed = a.family == "gemma2" or bool(a.full_attention_layers)
        masks = [None] * kinds
        if self.r.attention == "eager":
            masks = [tape.new(self.rows * self.seq, self.rest) for _ in masks]
        turns = 2 if a.family == "gemma3_text" and mixed else 1
        rotations = [[tape.new(self.seq * a.rotary_dim, self.rest) for _ in range(2)] for _ in range(turns)]
        x = embedded
        for number in range(self.layers):
            which = int(mixed and number == 1)
            cos, sin = rotations[which % turns]
            tape.place = (
                "the first layer" if number == 0 else "the last layer" if number == self.layers - 1 else "a layer"
            )
            tape.place += f"#{number}"
            if self.r.checkpointing:
                x = tape.checkpoint(self.placed, x, tape.place, positions, cos, sin, masks[which % kinds])
            else:
                x = self.layer(x, cos, sin, masks[which % kinds])
        tape.place = "the head"
        x = self.norm(x, "norm", a.hidden)
        return x

    def placed(self, x: Value, place: str, positions: Value, cos: Value, sin: Value, mask: Value | None) -> Value:
        """A checkpointed layer: torch keeps all that it was called with, the positions too."""
        self.tape.place = place
        return self.layer(x, cos, sin, mask)

    def loss(self, scored: str = "tokens") -> Value:
        """The loss: `scored` "tokens" (cross-entropy) or "sequences" (one number for each position: a reward model)."""
        tape, a = self.tape, self.a
        x = self.backbone()
        if scored == "sequences":
            score = self.weight("score", a.hidden, self.rest, True)
            return op.mean(tape, op.to(tape, op.linear(tape, x, score, self.rows), 4), 1)
        if a.tied:
            weight = self.weights[("the embedding", "embed_tokens")]
        else:
            weight = self.weight("lm_head", a.vocab * a.hidden, self.rest, self.full)
        if self.r.logits == "full":
            return heads.full(self, x, weight)
        rows = max(round(self.r.labelled * self.batch * (self.seq - 1)), 1)
        return (heads.labelled if self.r.logits == "labelled" else heads.chunked)(self, x, weight, rows)

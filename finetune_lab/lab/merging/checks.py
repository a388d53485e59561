"""Whether models can be merged: architectures, vocabularies, ties, shapes, and whether they come from one base.

Errors are raised: the result would be no model, or a broken one. Warnings are returned: the result is a model, and
probably not a good one. Nothing here reads more than a few megabytes, however large the models are.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from finetune_lab.errors import UserError
from finetune_lab.lab.merging.checkpoint import Checkpoint
from finetune_lab.lab.merging.parameters import METHODS, longest_gradient

# Keys of config.json that change what the same weights compute. The first group makes a merge meaningless.
MEANING = ("model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
           "tie_word_embeddings")  # fmt: skip
DETAILS = ("rope_parameters", "rope_theta", "rope_scaling", "rms_norm_eps", "layer_norm_eps", "sliding_window",
           "attention_bias", "logit_scale", "partial_rotary_factor")  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FAR = 0.5  # distance over norm; fine-tunes of one base are below 0.1 (see `bench merge`), strangers near 1.4
SAMPLE = 2**16  # entries of each sampled tensor
SPARE = 50_000_000  # bytes of disk for everything beside the tensors


def drop_what_is_rebuilt(model: Checkpoint) -> None:
    """Forget the tensors that loading makes anew: old checkpoints' rotary tables, and a tied head that was stored too."""
    for name in [name for name in model.tensors if name.endswith("rotary_emb.inv_freq")]:
        del model.tensors[name]
    if model.config.get("tie_word_embeddings") and {HEAD, EMBEDDING} <= model.tensors.keys():
        head, embedding = model.tensors[HEAD], model.tensors[EMBEDDING]
        if head.shape != embedding.shape or not torch.equal(head.map(), embedding.map()):
            raise UserError(
                f"{model.name} says that its head is tied to its embedding, and stores a head that differs: set "
                "tie_word_embeddings to false in its config.json, or delete the head."
            )
        del model.tensors[HEAD]


def same_architecture(models: list[Checkpoint]) -> list[str]:
    """Raise UserError for another architecture; return warnings for settings that change what weights mean."""
    first, *others = models
    warnings = []
    for other in others:
        for key in MEANING:
            a, b = first.config.get(key), other.config.get(key)
            if a != b:
                raise UserError(
                    f"{first.name} and {other.name} are different architectures ({key} is {a!r} and {b!r}): only models "
                    "of one architecture merge."
                )
        for key in DETAILS:
            a, b = first.config.get(key), other.config.get(key)
            if a != b:
                warnings.append(
                    f"{key} is {a!r} in {first.name} and {b!r} in {other.name}; the merged model gets the former."
                )
    return warnings


def same_vocabulary(models: list[Checkpoint]) -> list[str]:
    """Raise UserError where tokenizers disagree about an id; return a warning where one knows more tokens."""
    warnings = []
    known = [(model.name, vocabulary) for model in models if (vocabulary := _vocabulary(model.folder)) is not None]
    for name, vocabulary in known[1:]:
        first, reference = known[0]
        if vocabulary == reference:
            continue
        by_id = {i: token for token, i in reference.items()}
        for token, i in vocabulary.items():
            if reference.get(token, i) != i or by_id.get(i, token) != token:
                raise UserError(
                    f"{first} and {name} have different vocabularies (id {i} is {by_id.get(i, 'nothing')!r} in one and "
                    f"{token!r} in the other), so the rows of their embeddings mean different tokens: merge models with "
                    "one tokenizer."
                )
        only = min(vocabulary.keys() ^ reference.keys())
        knows, lacks = (name, first) if only in vocabulary else (first, name)
        warnings.append(
            f"{knows} knows the token {only!r} and {lacks} does not: its row was trained in one of them only."
        )
    return warnings


def same_shape(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError unless a tensor has one shape in all models."""
    if len(set(shapes.values())) > 1:
        shown = ", ".join(f"{shape} in {model}" for model, shape in shapes.items())
        vocabulary = any(word in name for word in ("embed", "wte", "lm_head"))
        why = "their vocabularies differ in size" if vocabulary else "only models of one size merge"
        raise UserError(f"{name} is {shown}: {why}.")


def normalizable(name: str, method: str, parameters: dict) -> None:
    """Raise UserError where a linear average divides by weights that add up to zero."""
    if method == "linear" and parameters.get("normalize") and sum(parameters["weight"]) == 0:
        raise UserError(
            f"the weights of {name} add up to 0, so they cannot be normalised: set normalize: false, or use "
            "task_arithmetic to subtract a model."
        )


def same_base(config, models: dict[str, Checkpoint], tensors: list) -> list[str]:
    """Warnings for models that seem to share no base: compared on samples of five large tensors.

    Raises UserError for weights that are no numbers.
    """
    matrices = sorted((t for t in tensors if len(t.shape) == 2), key=lambda t: -math.prod(t.shape))
    chosen = matrices[:: max(1, len(matrices) // 5)][:5]
    far: dict[str, list[float]] = {}
    for planned in chosen:
        samples = {model: _sample(models[model], name) for model, name in planned.inputs.items()}
        reference = config.base if config.base in samples else next(iter(samples))
        for model, sample in samples.items():
            if not torch.isfinite(sample).all():
                raise UserError(
                    f"{model} holds values that are no numbers in {planned.inputs[model]}: do not merge it."
                )
            if model != reference:
                apart = (sample - samples[reference]).norm() / samples[reference].norm().clamp(min=1e-30)
                far.setdefault(f"{model} and {reference}", []).append(float(apart))
    strangers = {pair: sum(d) / len(d) for pair, d in far.items() if sum(d) / len(d) > FAR}
    needs = METHODS[config.method].base and config.method != "slerp"
    why = (
        "a task vector is only the difference to the model's own base" if needs else "the mean of strangers is no model"
    )
    return [
        f"{pair} are {distance:.2f} of a norm apart, so they seem to share no base (fine-tunes: below 0.1): {why}."
        for pair, distance in strangers.items()
    ]


def seldom_meant(config, counts: dict[str, int]) -> list[str]:
    """Warnings for what a recipe says without effect, or without saying it. counts: {model: its number of layers}."""
    found = []
    used = {i for part in config.slices for s in part.sources for i in range(*(s.layers or (0, counts[s.model])))}
    most = max(counts.values())
    if left := sorted(set(range(most)) - used):
        which = ", ".join(str(i) for i in left)
        many = len(left) > 1
        found.append(
            f"layer{'s' * many} {which} of {most} (counted from 0) {'are' if many else 'is'} left out: no slice lists "
            f"{'them' if many else 'it'}."
        )
    longest = 0
    for part in config.slices:
        layers = [last - first for first, last in (s.layers or (0, counts[s.model]) for s in part.sources)]
        longest = max(longest, layers[0])
        own = {f"{key} of {s.model}": value for s in part.sources for key, value in s.parameters.items()}
        found += _too_long(own | part.parameters, layers[0])
    found += _too_long(config.parameters, longest)
    scopes = [config.parameters, *(part.parameters for part in config.slices)]
    if any(str(scope.get("int8_mask", False)).lower() != "false" for scope in scopes):
        found.append("int8_mask is ignored: it saves memory in mergekit, and a merge here holds one tensor at a time.")
    return found


def _too_long(parameters, layers: int) -> list[str]:
    """Warnings for gradients with more values than there are layers to read them."""
    return [
        f"{name} lists {count} values for {layers} layers: it is read once a layer, from its first value to its last, so "
        "some values count in part or not at all."
        for name, setting in parameters.items()
        if (count := longest_gradient(setting)) > layers
    ]


def room_on_disk(folder: Path, nbytes: int) -> None:
    """Raise UserError unless `nbytes` fit beside the folder."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes + SPARE:
        raise UserError(
            f"{folder} needs {(nbytes + SPARE) / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: make room, or give "
            "another --out."
        )


def _sample(model: Checkpoint, name: str) -> Tensor:
    """About 65,536 entries, whole rows from the middle of a matrix, fp32."""
    tensor = model.read(name)
    rows = max(1, SAMPLE // tensor.shape[1])
    start = max(0, tensor.shape[0] // 2 - rows // 2)
    return tensor[start : start + rows].float()


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """{token: id} of a folder's tokenizer.json; None where there is none to read."""
    try:
        value = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = value["model"]["vocab"]
        tokens = vocabulary if isinstance(vocabulary, dict) else {entry[0]: i for i, entry in enumerate(vocabulary)}
        return tokens | {token["content"]: token["id"] for token in value.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None

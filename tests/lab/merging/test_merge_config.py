"""A recipe is read as mergekit reads it, and what it does not know or would ignore is refused in one sentence."""

import pytest

from finetune_lab.errors import UserError
from finetune_lab.lab.merging import config
from finetune_lab.lab.merging.parameters import evaluate

A, B = {"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 2}}
TIES = {"merge_method": "ties", "base_model": "base", "models": [A, B]}
SLERP = {
    "merge_method": "slerp",
    "base_model": "a",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"t": 0.5},
}
RANGED = [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]}]
BAD = [
    ({}, "merge_method is None: choose one of linear, slerp"),
    ({"merge_method": "breadcrumbs", "models": [A]}, "merge_method is 'breadcrumbs': choose one of"),
    (TIES | {"merge_method": "TEIS"}, "merge_method is 'TEIS': did you mean ties? There are linear, slerp"),
    (TIES | {"base_model": None}, "ties needs base_model: the model that all of them were fine-tuned from"),
    (SLERP | {"base_model": None}, "slerp needs base_model: the model at t = 0"),
    (TIES | {"models": None}, "give either models or slices"),
    (TIES | {"slices": RANGED}, "give either models or slices"),
    (TIES | {"models": "a"}, "models is 'a': expected a list"),
    (TIES | {"models": ["a"]}, "models[0] is 'a': expected `model: NAME`"),
    (TIES | {"models": [A, A]}, "a is listed twice"),
    (TIES | {"models": [{"model": "base"}]}, "ties needs at least one model beside the base base"),
    (TIES | {"models": [A, {"model": "b"}]}, "b has no weight: give it one, or set parameters.weight for all models"),
    (TIES | {"models": [A, {"model": "b", "weight": 1}]}, "models[1]: unknown key 'weight'"),
    (TIES | {"models": [A | {"layer_range": [0, 2]}, B]}, "models[0]: unknown key 'layer_range'"),
    (TIES | {"models": [A, B, {"model": "base", "parameters": {"weight": 1}}]}, "base is the base model of ties"),
    (TIES | {"models": [A, {"model": {"path": "b"}}]}, "give the model as one text"),
    (TIES | {"modules": {}}, "modules is not supported here (merge with mergekit itself)"),
    (TIES | {"tokenizer": {"source": "base"}}, "tokenizer is not supported here; use tokenizer_source"),
    (TIES | {"basemodel": "x"}, "unknown key 'basemodel'; did you mean base_model?"),
    (TIES | {"parameters": {"densty": 0.2}}, "ties has no parameter 'densty' there; did you mean density?"),
    (TIES | {"parameters": {"epsilon": 0.2}}, "ties has no parameter 'epsilon' there (it has: density"),
    (TIES | {"parameters": {"lambda": "much"}}, "parameters.lambda is 'much': expected a number"),
    (TIES | {"parameters": {"lambda": float("nan")}}, "parameters.lambda is nan: expected a number"),
    (TIES | {"models": [A, {"model": "b", "parameters": {"weight": 1, "density": 20}}]},
     "models[1].parameters.density is 20: expected a share from 0 to 1 (20 % is 0.2)"),
    (TIES | {"parameters": {"density": [0.2, 1.5]}}, "parameters.density is 1.5: expected a share"),
    (TIES | {"parameters": {"density": [{"filter": "mlp", "value": "-1e-3"}]}}, "density[0].value is '-1e-3': expected a"),
    (TIES | {"parameters": {"weight": float("inf")}}, "parameters.weight is inf: expected a number"),
    (SLERP | {"parameters": {"t": [0, 50]}}, "parameters.t is 50: expected a place from 0 (the base) to 1 (the other)"),
    (TIES | {"parameters": {"density": []}}, "parameters.density is []: expected a number, a list of numbers"),
    (TIES | {"parameters": {"normalize": 0.5}}, "parameters.normalize is 0.5: expected true or false"),
    (TIES | {"parameters": {"density": [{"filter": "mlp"}]}}, "parameters.density[0] has no value"),
    (TIES | {"parameters": {"density": [{"flter": "mlp", "value": 1}]}}, "unknown key 'flter'; did you mean filter?"),
    (TIES | {"parameters": {"density": [0.1, {"value": 1}]}}, "parameters.density is {'value': 1}: expected a number"),
    (TIES | {"models": [A | {"parameters": {"normalize": True}}, B]}, "normalize is a setting of the whole merge"),
    ({"merge_method": "task_arithmetic", "base_model": "base", "models": [A], "parameters": {"density": 0.2}},
     "task_arithmetic has no parameter 'density' there"),
    (SLERP | {"parameters": {}}, "slerp needs parameters.t: a number, or a list"),
    (SLERP | {"models": [{"model": m} for m in "abc"]}, "slerp merges exactly 2 models, the base included; 3 are listed"),
    (TIES | {"dtype": "int8"}, "dtype is 'int8': choose one of float32"),
    (TIES | {"base_model": 3}, "base_model is 3: expected the name or the folder of a model"),
    (TIES | {"models": None, "slices": RANGED}, "a slice does not list the base model base"),
    (SLERP | {"models": None, "slices": [{"sources": [{"model": "a"}]}]}, "slices[0].sources[0].layer_range is None"),
    (SLERP | {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]}, "layer_range is [2, 2]"),
    (SLERP | {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]},
                                                      {"model": "b", "layer_range": [0, 3]}]}]},
     "slices[0]: its layer ranges have [2, 3] layers"),
    (SLERP | {"models": None, "slices": [RANGED[0] | {"base_model": "b"}]}, "use base_model of the whole config"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_what_is_wrong_is_said_in_one_sentence(value, says):
    with pytest.raises(UserError) as error:
        config.read({key: v for key, v in value.items() if v is not None})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    for text, says in [("a: [", "is not YAML"), ("", "holds no settings"), (None, "cannot be read")]:
        path = tmp_path / "x.yml"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=says):
            config.load(path)


def test_numbers_written_as_text_are_read_as_mergekit_does():
    made = config.read(TIES | {"parameters": {"lambda": "1e-1", "density": ["0.5", 1]}})
    assert config.resolve(made, made.slices[0], "x", 0.5, {"a": "x", "b": "x", "base": "x"}) == {
        "normalize": True, "lambda": 0.1, "weight": [1.0, 2.0], "density": [0.75, 0.75]
    }  # fmt: skip


def test_a_models_own_setting_goes_before_the_configs_and_a_filter_that_fits_nothing_does_not_count():
    own = A | {"parameters": {"weight": [{"filter": "mlp", "value": 3}]}}
    made = config.read(TIES | {"models": [own, B], "parameters": {"weight": 5}})
    weights = [
        config.resolve(made, made.slices[0], name, 0, {"a": name, "b": name})["weight"] for name in ("mlp.up", "norm")
    ]
    assert weights == [[3.0, 2.0], [5.0, 2.0]]


def test_a_weight_whose_filters_leave_a_tensor_out_is_an_error():
    own = A | {"parameters": {"weight": [{"filter": "mlp", "value": 3}]}}
    made = config.read(TIES | {"models": [own, B]})
    with pytest.raises(UserError, match="no weight for norm"):
        config.resolve(made, made.slices[0], "norm", 0, {"a": "norm", "b": "norm"})


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.9, 0.3),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 3], 0.75, 2.0),
        ([0, 1, 3], 1.0, 3.0),
        ([{"filter": "attn", "value": [0, 1]}, {"filter": "*", "value": 7}], 0.5, 7.0),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 7}], 0.5, 0.5),
        ({"filter": "attn", "value": 1}, 0.5, None),
    ],
)
def test_gradients_are_interpolated_and_the_first_fitting_filter_counts(setting, t, expected):
    assert evaluate(setting, "model.layers.3.mlp.up_proj.weight", t) == expected


def test_switches_of_a_gradient_are_not_interpolated():
    assert [evaluate([True, False], "x", t, switch=True) for t in (0, 0.5, 1)] == [True, True, False]

"""Every family with its FFNs replaced, against the model as it was and against masks by hooks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file

from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.loading import load_model, set_activation
from sparsecast.kernels.in_models.sparse_ffn import SparseFFN
from sparsecast.kernels.in_models.sparsify import sparsify_model
from sparsecast.predictors.model_in_loop import predictors_in_loop

RELUS = ["llama", "prosparse", "mistral", "bamboo", "gemma2", "opt", "falcon-7b", "falcon-40b"]
SQUARES = ["arcee", "nemotron", "nanochat", "jais2", "persimmon"]
FAMILIES = [*RELUS, *SQUARES, "bitnet"]
SHAPES = [(1, 1), (2, 3), (2, 11)]
"""A token, few tokens (over rows), many (dense)."""


def sparse_layers(model) -> list[SparseFFN]:
    return [module for module in model.modules() if isinstance(module, SparseFFN)]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_the_model(family, make, ids, logits, near):
    dense, sparse = make(family), sparsify_model(make(family), None, "exact")

    assert len(sparse_layers(sparse)) == 2
    for shape in SHAPES:
        near(logits(sparse, ids(*shape)), logits(dense, ids(*shape)))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, dtype) for family in RELUS for dtype in ("f16", "q8_0", "q4_0")),
        *((family, "q4_0") for family in SQUARES),
    ],
)
def test_predicted_is_the_model_with_masks(family, dtype, make, predictors, ids, logits, near):
    dense, predicted = make(family), predictors(dtype, threshold=0.05)
    sparse = sparsify_model(make(family), predicted, "predicted")

    assert all(layer.predicts for layer in sparse_layers(sparse))
    for shape in SHAPES:
        with predictors_in_loop(dense, predicted):
            want = logits(dense, ids(*shape))
        near(logits(sparse, ids(*shape)), want)
    assert (want - logits(dense, ids(*shape))).abs().max() > 0.1 * want.abs().max()


def test_a_norm_of_x1_sees_only_what_is_predicted(make, predictors, ids, logits, near):
    dense, chosen = make("bitnet"), predictors("q4_0", threshold=0.05)
    sparse = sparsify_model(make("bitnet"), chosen, "predicted")
    seen = {}
    for number, layer in enumerate(dense.model.layers):

        def keep(_, args, number=number):
            seen[number] = args[0]

        def mask(_, args, number=number):
            logits_BSF = chosen.layers[number].logits(seen[number])
            return args[0] * (logits_BSF >= chosen.threshold)

        layer.post_attention_layernorm.register_forward_pre_hook(keep)
        layer.mlp.ffn_sub_norm.register_forward_pre_hook(mask)

    for shape in SHAPES:
        want = logits(dense, ids(*shape))
        near(logits(sparse, ids(*shape)), want)
    assert (want - logits(make("bitnet"), ids(*shape))).abs().max() > 0.1 * want.abs().max()


@pytest.mark.parametrize(
    ("policy", "family"),
    [
        ("exact", "prosparse"),
        ("predicted", "bamboo"),
        ("predicted", "opt"),
        ("exact", "bitnet"),
        pytest.param("predicted", "prosparse", marks=pytest.mark.slow),
        pytest.param("exact", "bamboo", marks=pytest.mark.slow),
        pytest.param("exact", "opt", marks=pytest.mark.slow),
        pytest.param("predicted", "jais2", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_in_a_model(policy, family, make, predictors, ids, logits, near):
    """16-bit models take the kernels, in Triton's interpreter here."""
    dense, predicted = make(family, torch.float16), predictors("q8_0")
    sparse = sparsify_model(make(family, torch.float16), predicted, policy)

    want = logits(dense, ids(1, 2))
    if policy == "predicted":
        with predictors_in_loop(dense, predicted):
            want = logits(dense, ids(1, 2))
    near(logits(sparse, ids(1, 2)), want, 5e-3)


def test_batches_change_no_token(make, predictors):
    """Each token's output alone, among others, and in a prompt."""
    model = sparsify_model(make("prosparse"), predictors(), "predicted")
    layer = sparse_layers(model)[0]
    x_TD, z_TD = torch.randn(16, 64), torch.randn(16, 64)

    def run(count: int) -> torch.Tensor:
        parts = []
        for x, z in zip(x_TD.split(count), z_TD.split(count), strict=True):
            layer.keep_predictor_input(layer, (z[None],))
            parts.append(layer(x[None])[0])
        return torch.cat(parts)

    with torch.no_grad():
        alone = run(1)
        assert torch.allclose(run(8), alone, atol=1e-5)
        assert torch.allclose(run(16), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("llama", ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")),
        ("opt", ("fc2", "fc1")),
        ("falcon-7b", ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h")),
        ("bitnet", ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.ffn_sub_norm")),
    ],
)
def test_weights_are_shared_and_not_copied(family, parts, make, predictors):
    model = make(family)
    size = _bytes(model)
    layer = model.base_model.get_submodule(LAYERS[family])[0]
    down, *others = (weakref.ref(layer.get_submodule(part).weight) for part in parts)
    kept = {other().data_ptr() for other in others}

    sparsify_model(model, None, "exact")

    gc.collect()
    assert down() is None
    assert _bytes(model) == size
    assert {other().data_ptr() for other in others} == kept


LAYERS = {"llama": "layers", "bitnet": "layers", "opt": "decoder.layers", "falcon-7b": "h"}


def _bytes(model) -> int:
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_model_that_was(family, make, predictors):
    model = make(family)
    want = {name: value.clone() for name, value in model.state_dict().items()}

    state = sparsify_model(model, predictors(), "predicted").state_dict()

    assert set(state) == set(want)
    assert all(torch.equal(state[name], want[name]) for name in want)


@pytest.mark.parametrize("family", ["persimmon", "bitnet"])
def test_a_saved_folder_is_the_one_of_the_dense_model(family, make, tmp_path):
    make(family).save_pretrained(tmp_path / "dense")
    sparsify_model(make(family), None, "exact").save_pretrained(tmp_path / "sparse")
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "sparse"))
    assert set(got) == set(want)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_saved_model_loads_again(model_folder, tmp_path, ids, logits):
    model, tokenizer = load_model(str(model_folder), device="cpu")
    want = logits(model, ids(1, 9))
    sparsify_model(model, None, "exact").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    again, _ = load_model(str(tmp_path), device="cpu")

    assert torch.equal(logits(again, ids(1, 9)), want)


def test_a_copy_is_a_model_of_its_own(make, predictors, ids, logits):
    model = sparsify_model(make("llama"), predictors(), "predicted")
    want = logits(model, ids(1, 3))
    twin = copy.deepcopy(model)
    for layer in sparse_layers(model):
        layer.fc2.zero_()

    assert torch.equal(logits(twin, ids(1, 3)), want)
    assert not torch.equal(logits(model, ids(1, 3)), want)


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("prosparse", ActivationRule("fatrelu", 0.9)),
        ("prosparse", ActivationRule("relu")),
        ("llama", ActivationRule("relu2")),
        ("arcee", ActivationRule("relu")),
    ],
    ids=str,
)
def test_an_activation_set_on_the_module_goes_before_the_configs(family, rule, make, ids, logits):
    models = [make(family), make(family)]
    for model in models:
        set_activation(model, rule)
    dense, sparse = models[0], sparsify_model(models[1], None, "exact")
    assert torch.allclose(logits(sparse, ids(1, 4)), logits(dense, ids(1, 4)), atol=1e-4)


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("opt", "predicted"),
        ("falcon-7b", "exact"),
        pytest.param("opt", "exact", marks=pytest.mark.slow),
        pytest.param("falcon-7b", "predicted", marks=pytest.mark.slow),
    ],
)
def test_it_compiles_as_one_graph(family, policy, make, predictors, ids, logits):
    model = sparsify_model(make(family), predictors(), policy)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)

    for shape in (SHAPES[0], SHAPES[2]):
        assert torch.equal(logits(compiled, ids(*shape)), logits(model, ids(*shape)))
    assert all(layer._predictor_input is None for layer in sparse_layers(model))


@pytest.mark.slow
def test_the_kernels_compile_as_one_graph(make, predictors, ids, logits):
    model = sparsify_model(make("prosparse", torch.bfloat16), predictors("q4_0"), "predicted")
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)

    assert torch.equal(logits(compiled, ids(1, 1)), logits(model, ids(1, 1)))

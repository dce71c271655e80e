"""SmallThinker's configs, and its class beside what the other tests of mixtures hold."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.pretrained import empty_model
from tests.tools.mixtures import CONFIGS, LAYERS, forward, write_mixture


@pytest.fixture
def folder(tmp_path, model_folder):
    return write_mixture(tmp_path / "m", "smallthinker", model_folder)


def change(folder, drop=(), **fields):
    path = folder / "config.json"
    raw = {k: v for k, v in json.loads(path.read_text()).items() if k not in drop}
    path.write_text(json.dumps(raw | fields))


def test_tensor_names_are_those_published(folder):
    model, _ = load_model(str(folder), device="cpu")
    names = set(load_file(folder / "model.safetensors"))
    assert set(empty_model(model.config).state_dict()) == names | {"lm_head.weight"}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window_layout": None, "rope_layout": None},
        {"sliding_window_layout": [1, 1, 1], "sliding_window_size": 3},
        {"rope_layout": [0, 0, 0]},
        {"tie_word_embeddings": False},
        {"moe_layer_layout": [1, 1, 1], "moe_enable_early_router": True},
    ],
)
def test_every_layout_is_followed(fields, tmp_path, model_folder):
    used = {name: value for name, value in fields.items() if value is not None}
    folder = write_mixture(tmp_path / "m", "smallthinker", model_folder, **used)
    if len(used) < len(fields):  # in the file as null; the forward pass by hand has defaults
        change(folder, drop=fields)
    ids = torch.randint(3, 500, (30,)).tolist()
    want_TV, _ = forward(folder, ids)
    change(folder, **fields)
    model, _ = load_model(str(folder), device="cpu")
    with torch.inference_mode():
        logits_TV = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits_TV.double(), want_TV, rtol=1e-4, atol=1e-4)


def test_the_cache_changes_no_token(folder):
    """Beyond the window, and layers of both kinds."""
    model, _ = load_model(str(folder), device="cpu")
    ids = torch.randint(3, 500, (1, 12))
    with torch.inference_mode():
        kept = model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=True)
        fresh = ids
        for _ in range(10):
            logits = model(fresh, use_cache=False).logits[:, -1]
            fresh = torch.cat([fresh, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(kept[0], fresh[0, : kept.shape[1]])
    assert kept.shape[1] > 13


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"moe_layer_layout": [0, 1, 1]},
            "moe_layer_layout names dense layers, which no",
        ),
        ({"moe_enable_early_router": False}, "moe_enable_early_router is False, expected True"),
        ({"moe_enable_secondary_experts": True}, "moe_enable_secondary_experts is True"),
        ({"moe_shared_primary_experts": 1}, "moe_shared_primary_experts is 1, expected 0"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"rope_layout": [1, 1]}, "rope_layout is .*expected a 0 or a 1 for each of 3 layers"),
        ({"rope_layout": "all"}, "rope_layout is all"),
        ({"sliding_window_layout": [0, 2, 0]}, "sliding_window_layout is"),
        ({"moe_num_primary_experts": None}, "needs a number under moe_num_primary_experts"),
        ({"moe_num_primary_experts": 10**9}, "describes 1,000,000,000 experts"),
        ({"moe_num_primary_experts": "4"}, "moe_num_primary_experts is '4'"),
        ({"moe_ffn_hidden_size": 0}, "moe_ffn_hidden_size is 0"),
        ({"hidden_act": "silu"}, "leaves no exact zeros"),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, "factor is -1"),
    ],
)
def test_what_the_published_models_do_not_have_is_refused(fields, says, folder):
    change(folder, **fields)
    with pytest.raises(InputError, match=says) as error:
        load_model(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_fatrelu_reaches_the_experts(folder):
    model, _ = load_model(str(folder), device="cpu", activation_threshold=0.3)
    acts = [layer.block_sparse_moe.experts.act_fn for layer in model.model.layers]
    assert [act.threshold for act in acts] == [0.3] * LAYERS


def test_the_published_configs_are_whole():
    assert "hidden_act" not in CONFIGS["smallthinker"]
    assert "model_type" not in CONFIGS["smallthinker-softmax"]

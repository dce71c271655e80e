"""A converted MiniCPM against its forward by hand, and what a conversion leaves and says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from native_minicpm import THRESHOLD, minicpm_logits, save_minicpm
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import ACT2FN

from sparsecast.core.errors import InputError
from sparsecast.core.models.activations import ActivationRule
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.export.to_llama import proof, run, weights
from sparsecast.export.to_llama.config import ConvertConfig
from sparsecast.export.to_llama.run import convert


def converted(model: Path, out: Path) -> Path:
    return convert(ConvertConfig(model=str(model), to="llama", out=out))


@pytest.fixture(scope="module")
def source(once, model_folder) -> Path:
    return once("native-minicpm", lambda folder: save_minicpm(folder, model_folder))


@pytest.fixture(scope="module")
def llama(once, source) -> Path:
    """The converted folder, not to be written to."""
    return once("minicpm-as-llama", lambda folder: converted(source, folder))


@pytest.fixture
def ids_S():
    return torch.randint(3, 512, (60,), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def plain(monkeypatch):
    """Load a folder with transformers alone; FATReLU is a threshold that does not know ours."""

    def load(folder: Path):
        own = (torch.nn.Threshold, {"threshold": THRESHOLD, "value": 0.0})
        monkeypatch.setitem(ACT2FN, "fatrelu", own)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert type(model).__name__ == "LlamaForCausalLM"
        return model.eval()

    return load


def apart(got_SV, want_SV) -> float:
    return float((got_SV.double() - want_SV).abs().max() / want_SV.abs().max())


@pytest.mark.parametrize(("tied", "shards"), [(True, 1), (False, 3)])
def test_it_computes_what_minicpms_formulas_say(
    model_folder, tmp_path, monkeypatch, plain, ids_S, tied, shards
):
    """In float32 to 1e-4 of the largest logit, from one file or shards into one or several."""
    wanted = save_minicpm(tmp_path / "m", model_folder, tied=tied, shards=shards)
    if shards > 1:
        monkeypatch.setattr(weights, "SHARD", 10**6)

    out = converted(tmp_path / "m", tmp_path / "llama")

    with torch.inference_mode():
        got_SV = plain(out)(ids_S[None]).logits[0]
    want_SV = minicpm_logits(wanted, ids_S)
    assert apart(got_SV, want_SV) < 2e-6
    assert apart(minicpm_logits(wanted, ids_S, threshold=0.0), want_SV) > 1e-3
    found = sorted(out.glob("*.safetensors"))
    assert len(found) == (1 if shards == 1 else 5)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert found[0].name == "model-00001-of-00005.safetensors"
        assert {path.name for path in found} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(w.nbytes for w in wanted.values())
        for path in found:
            assert all(index["weight_map"][name] == path.name for name in load_file(path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_products_are_rounded_once_to_the_stored_dtype(model_folder, tmp_path, dtype):
    wanted = save_minicpm(tmp_path / "m", model_folder, dtype=dtype)

    made = load_file(converted(tmp_path / "m", tmp_path / "llama") / "model.safetensors")

    depth = 1.4 / 3**0.5
    factors = {"embed_tokens": 12.0, "lm_head": 0.25, "o_proj": depth, "down_proj": depth}
    for name, got in made.items():
        source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        factor = factors.get(name.split(".")[-2], 1.0)
        product = wanted[source].double() * factor
        through = product if dtype == torch.float64 else product.float()
        assert torch.equal(got, through.to(dtype)), name
    told = json.loads((tmp_path / "llama" / "convert.json").read_text())["proof"]
    assert told["apart"] < 1e-8
    low, high = (0, 1e-9) if dtype == torch.float64 else (1e-5, 0.05)
    assert low <= told["moved"] < high


def test_the_threshold_and_the_files_stay(source, llama):
    config = json.loads((llama / "config.json").read_text())
    wanted = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "fatrelu",
        "hidden_act_param": THRESHOLD,
        "tie_word_embeddings": False,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
    }
    assert wanted.items() <= config.items()
    assert not {"auto_map", "scale_emb", "scale_depth", "dim_model_base"} & set(config)
    assert not [name for name in config if "multiplier" in name]
    for name in ("generation_config.json", "tokenizer.model"):
        assert (llama / name).read_bytes() == (source / name).read_bytes()
    model, _ = load_model(str(llama), device="cpu")
    assert model.model.layers[2].mlp.act_fn.threshold == THRESHOLD
    modes = {path.stat().st_mode for path in llama.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "LlamaTokenizer"}, None])
def test_transformers_alone_puts_one_bos_in_front(source, model_folder, tmp_path, settings):
    model = Path(shutil.copytree(source, tmp_path / "m"))
    path = model / "tokenizer_config.json"
    if settings is None:  # a class that is code
        settings = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["t.T", None]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    before = load_tokenizer(Checkpoint(str(model)))

    made = AutoTokenizer.from_pretrained(converted(model, tmp_path / "llama"))

    for text in ("", "a", "  two  spaces\n", "def f(x):\n\treturn x", "<s>", "\u4f60\u597d"):
        want = before(text, add_special_tokens=False)["input_ids"]
        assert made(text)["input_ids"] == [1, *want]
        assert made(text, add_special_tokens=False)["input_ids"] == want
    assert made("a", "b")["input_ids"].count(1) == 2
    assert "auto_map" not in json.loads((tmp_path / "llama" / path.name).read_text())


def test_a_chat_is_minicpms_behind_one_bos(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    turns = [
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi.\n"},
        {"role": "user", "content": "Bye"},
    ]
    want = "<s><用户>Hello<AI>Hi.<用户>Bye<AI>"

    for prompt in (True, False):
        options = {"add_generation_prompt": prompt}
        assert tokenizer.apply_chat_template(turns, tokenize=False, **options) == want
        made = tokenizer.apply_chat_template(turns, **options)["input_ids"]
        assert made == tokenizer(want.removeprefix("<s>"))["input_ids"]
        assert made.count(1) == 1
    done = [*turns, {"role": "assistant", "content": "See you"}]
    assert tokenizer.apply_chat_template(done, tokenize=False) == want + "See you"


def test_a_template_of_its_own_stays(source, tmp_path, capfd):
    model = Path(shutil.copytree(source, tmp_path / "m"))
    (model / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")

    out = converted(model, tmp_path / "llama")

    tokenizer = AutoTokenizer.from_pretrained(out)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert said == "a!"
    assert "own chat template writes no BOS" in " ".join(capfd.readouterr().err.split())


def test_it_says_what_it_proved_and_who_reads_it(source, tmp_path, capfd):
    converted(source, tmp_path / "llama")

    told = " ".join(capfd.readouterr().err.split())
    assert "proved equal on 192 tokens of 4 texts" in told
    assert "Rounding the scaled weights to float32 moves logits by up to" in told
    assert "they are two, which takes 131 kB more" in told
    assert "llama.cpp computes SiLU instead without saying so" in told
    assert "hidden_act_param 0.03" in told
    assert "writes no BOS" not in told


def test_a_finished_conversion_is_kept_and_another_one_refused(source, llama, tmp_path, capfd):
    out = Path(shutil.copytree(llama, tmp_path / "llama"))
    before = (out / "convert.json").stat().st_mtime_ns
    assert converted(source, out) == out
    assert "already converted" in " ".join(capfd.readouterr().err.split())
    assert (out / "convert.json").stat().st_mtime_ns == before

    model = Path(shutil.copytree(source, tmp_path / "m"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "scale_depth": 1.5}))
    with pytest.raises(ValueError, match="a converted model made differently .config was"):
        converted(model, out)
    (out / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds a damaged conversion .*no model.safetensors"):
        converted(source, out)


def wrong_factor(monkeypatch):
    own = run.plan_conversion

    def plan(cfg):
        made = own(cfg)
        at = next(i for i, t in enumerate(made.tensors) if "layers.1.mlp.down_proj" in t.name)
        made.tensors[at] = made.tensors[at]._replace(factor=made.tensors[at].factor * 1.01)
        return made

    monkeypatch.setattr(run, "plan_conversion", plan)


def wrong_value(monkeypatch):
    monkeypatch.setattr(weights, "folded", lambda rows, factor: rows * factor * (1 + 1e-6))


def lost_threshold(monkeypatch):
    own = run.plan_conversion

    def plan(cfg):
        made = own(cfg)
        made.config.hidden_act = "relu"
        return made

    monkeypatch.setattr(run, "plan_conversion", plan)


def no_bos(monkeypatch):
    own = run.write_tokenizer

    def write(tokenizer, source, folder, *, minicpm):
        own(tokenizer, source, folder, minicpm=minicpm)
        spec = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**spec, "post_processor": None}))

    monkeypatch.setattr(run, "write_tokenizer", write)


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (wrong_factor, "does not compute what the model does"),
        (wrong_value, "is not the model's times"),
        (lost_threshold, "does not compute what the model does"),
        (no_bos, "gives other ids"),
    ],
)
def test_a_fault_of_the_conversion_is_seen_and_leaves_nothing(
    source, tmp_path, monkeypatch, fault, match
):
    fault(monkeypatch)

    with pytest.raises(RuntimeError, match=match):
        converted(source, tmp_path / "llama")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_the_proof_is_of_the_streamed_models(source, llama, ids_S):
    """Their logits are transformers' own, and MiniCPM's by hand."""
    wanted = load_file(source / "model.safetensors")
    checkpoint = Checkpoint(str(llama))
    model, _ = load_model(str(llama), device="cpu", dtype="float32")

    got_NSV = proof.streamed_logits(
        checkpoint.config,
        ActivationRule("fatrelu", THRESHOLD),
        lambda name: iter([checkpoint.tensor(name).double()]),
        ids_S[None],
    )

    with torch.inference_mode():
        assert apart(model(ids_S[None]).logits, got_NSV) < 2e-6
    assert apart(got_NSV[0], minicpm_logits(wanted, ids_S)) < 2e-6

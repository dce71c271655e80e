"""Models that lie, are damaged or bring code: nothing runs, and one line names the fault."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from sparsecast.core.errors import InputError
from sparsecast.core.hub import is_path
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model, open_model
from sparsecast.core.models.location import TINY_PROSPARSE, find_local, resolve_model


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder: Path, match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        open_model(str(folder))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


@pytest.fixture
def no_questions(monkeypatch):
    def ask(*_: object) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("sparsellama", {}),
        ("bamboo", {"hidden_act": "relu"}),
        ("minicpm", {"scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4}),
    ],
)
def test_code_that_comes_with_a_model_never_runs(kind, fields, folder, no_questions):
    mark = folder / "ran"
    code = f"open({str(mark)!r}, 'w').write('x')\n"
    for name in ("conf.py", "model.py", "tok.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    maps = {"AutoConfig": "conf.C", "AutoModelForCausalLM": "model.M", "AutoTokenizer": "tok.T"}
    kernel = {"attn_implementation": "owner/kernel", "_attn_implementation": "owner/kernel"}
    edit(folder / "config.json", model_type=kind, auto_map=maps, **fields, **kernel)
    maps = {"AutoTokenizer": ["tok.T", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="T", auto_map=maps)

    model, tokenizer = load_model(str(folder), device="cpu")

    assert not mark.exists()
    assert tokenizer("def f", add_special_tokens=False)["input_ids"]
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_family_of_its_own_code_alone_is_refused_in_one_line(folder, no_questions):
    edit(folder / "config.json", model_type="riddle", auto_map={"AutoConfig": "conf.C"})
    refused(folder, r"model_type is 'riddle'.*\(auto_map\) is never run")


def test_another_config_for_another_version_of_transformers_is_not_read(folder):
    edit(folder / "config.json", configuration_files=["config.4.0.0.json"])
    (folder / "config.4.0.0.json").write_text('{"model_type": "gpt2"}')
    assert Checkpoint(str(folder)).config.model_type == "llama"


class Evil:
    def __reduce__(self):
        return (os.system, ("exit 1",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_more_than_tensors_is_refused_in_words_of_ours(folder, zipped):
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"x": Evil()}, path, _use_new_zipfile_serialization=zipped)
    refused(folder, r"holds more than tensors \(posix\.system\).*give model\.safe")
    path.write_bytes(pickle.dumps(3))
    refused(folder, "pytorch_model.bin: not a readable torch file")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_hidden_layers": 10**9}, "describes 1,000,000,000 layers, but the weights hold 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"num_hidden_layers": 2}, "describes 2 layers, but the weights hold 3"),
        ({"vocab_size": 10**9}, r"is \[512, 64\], but config.json describes \[1000000000, 64\]"),
        ({"hidden_size": 10**8}, r"but config.json describes \[512, 100000000\]"),
        ({"head_dim": 10**9}, r"q_proj.weight is \[64, 64\], but config.json describes"),
        ({"intermediate_size": 10**400}, "intermediate_size is 1000.*, expected a whole number"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected a number from 0 to 1"),
        ({"norm_eps": 2}, "norm_eps is 2, expected a number from 0 to 1"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2, expected a number above 0 and"),
        ({"final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a number above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, expected a number above 0"),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
        ({"rope_parameters": {"rope_type": "riddle", "rope_theta": 1e4}}, "cannot build the model"),
        ({"hidden_size": None}, "Field 'hidden_size' expected int, got NoneType"),
        ({"architectures": [1]}, r"architectures is \[1\], expected a list of names"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\], expected one of"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config makes layers of different kinds"),
        ({"pad_token_id": 512}, "pad_token_id is 512 in config.json, but .* ids 0 to 511"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized \(gptq\)"),
        ({"quantization_config": "bitnet"}, "transformers cannot read it"),
    ],
)
def test_an_absurd_config_is_refused_before_anything_is_built(fields, match, folder):
    edit(folder / "config.json", **fields)
    refused(folder, match)


@pytest.mark.parametrize("text", ['{"a":' * 90_000 + "1" + "}" * 90_000, '{"hidden_size": NaN}'])
def test_configs_that_are_no_json_are_refused(text, folder):
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json: is not JSON")


def test_generation_configs_that_transformers_chokes_on_are_named(folder):
    for text in ('{"a":' * 90_000 + "1" + "}" * 90_000, "[1]"):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(InputError, match="check config.json and generation_config.json"):
            load_model(str(folder), device="cpu")


def test_a_padding_token_from_the_end_is_that_of_llama_1(folder):
    edit(folder / "config.json", pad_token_id=-1)
    load_model(str(folder), device="cpu")


@pytest.mark.parametrize("special", [False, True])
def test_text_must_not_reach_beyond_the_embedding(special, folder):
    """Many models have a special token there, for padding, that no text gives."""
    path = folder / "tokenizer.json"
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": 512, "content": "import os", "special": special, **flags}
    added = json.loads(path.read_text())["added_tokens"]
    edit(path, added_tokens=[*added, token])
    if special:
        open_model(str(folder))
    else:
        refused(folder, "the tokenizer has 'import os' as id 512, but .* ids 0 to 511")


@pytest.mark.parametrize("threshold", [float("inf"), float("nan"), 1e308, -0.1])
def test_a_threshold_is_a_number_that_something_can_reach(threshold, folder):
    with pytest.raises(InputError, match="--activation-threshold: got"):
        load_model(str(folder), device="cpu", activation_threshold=threshold)


def test_a_threshold_is_finite_in_the_models_dtype(folder):
    with pytest.raises(InputError, match="threshold 100000 is infinite in float16"):
        load_model(str(folder), device="cpu", dtype="float16", activation_threshold=1e5)
    for absurd in (1e308, 10**400):
        edit(folder / "config.json", hidden_act_param=absurd)
        with pytest.raises(InputError, match="hidden_act_param is '1"):
            load_model(str(folder), device="cpu")


def test_a_config_without_model_type_is_known_by_its_architecture(family_folder, tmp_path):
    """MiniCPM's own, and what was derived from it."""
    copy = Path(shutil.copytree(family_folder("minicpm"), tmp_path / "m"))
    raw = json.loads((copy / "config.json").read_text())
    del raw["model_type"]
    (copy / "config.json").write_text(json.dumps(raw))

    model, _ = load_model(str(copy), device="cpu")

    assert model.config.model_type == "granite"
    assert model.config.embedding_multiplier == 12
    edit(copy / "config.json", architectures=["RiddleForCausalLM"])
    refused(copy, "model_type is None, expected one of")


@pytest.fixture
def no_network(monkeypatch):
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize(
    "name",
    ["", "./m", "~/no-such-model", "/m", "a/b/c", "a/b/", "a\\b", "m", "..", "a/..", "here/m"],
)
def test_what_looks_like_a_path_never_goes_to_the_network(name, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=r"no such model folder|no config\.json|expected a model"):
        Checkpoint(name)


def test_a_file_is_no_model(tmp_path, no_network):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(InputError, match=r"m\.gguf: is not a folder"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_the_shipped_model_has_a_name_of_its_own(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    assert (
        resolve_model("tiny-prosparse")
        == resolve_model("sparsify/tiny-prosparse")
        == TINY_PROSPARSE
    )
    assert (TINY_PROSPARSE / "config.json").is_file()
    (tmp_path / "tiny-prosparse").mkdir()
    assert resolve_model("tiny-prosparse") == Path("tiny-prosparse")
    assert find_local("owner/name") is None
    assert not is_path("owner/name")


def test_a_hub_that_cannot_be_reached_is_said_and_its_cache_is_used(tmp_path, monkeypatch, capfd):
    def answer(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("sparsecast.core.hub.HfApi.model_info", answer)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"owner/name: neither a local folder.*\(no route\)"):
        resolve_model("owner/name")
    monkeypatch.setattr("sparsecast.core.hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert resolve_model("owner/name") == tmp_path
    assert "its copy in the cache is used" in " ".join(capfd.readouterr().err.split())


def test_what_is_downloaded_is_a_license_too_but_no_code(tmp_path, monkeypatch):
    """A copy of the model must hand the license on."""
    names = ["model.safetensors", "pytorch_model.bin", "config.json", "LICENSE", "NOTICE.txt"]
    names += ["USE_POLICY.md", "README.md", "modeling_x.py", "qwen.tiktoken", "chat.jinja"]
    files = [SimpleNamespace(rfilename=name) for name in names]
    info = SimpleNamespace(siblings=files, sha="0" * 40)
    monkeypatch.setattr("sparsecast.core.hub.HfApi.model_info", lambda *_, **__: info)
    asked = {}
    monkeypatch.setattr(
        "sparsecast.core.hub.snapshot_download",
        lambda *_, **options: asked.update(options) or str(tmp_path),
    )

    resolve_model("owner/name")

    got = filter_repo_objects(names, allow_patterns=asked["allow_patterns"])
    assert set(names) - set(got) == {"pytorch_model.bin", "README.md", "modeling_x.py"}

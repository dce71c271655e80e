"""Random predictors with a mixed mask for the small model, and the bundle made of both."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.families import activation_rule, family_of
from sparsecast.core.models.loading import set_activation
from sparsecast.export.config import ExportConfig
from sparsecast.export.read import other_tokens
from sparsecast.export.run import export
from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.manifest import PredictorManifest
from sparsecast.predictors.predictor import Predictor

LAYERS, HIDDEN, FFN, RANK = 3, 64, 1280, 16
SAMPLE = [
    "def f(x):\n    return x\n",
    "It's 1234567 and 89, isn't it?",
    "IT'S a  b;\n\n  cafe\u0301",
]
"""Cut by the engine as by GPT-2; the second otherwise than by SmolLM2's rules or Llama 3's."""
COMMON = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GATED = {
    **COMMON,
    "intermediate_size": FFN,
    "num_key_value_heads": 4,
    "hidden_act": "relu",
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
GROUPED = {**GATED, "num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e4}}
GROUPED_TIED = {**GROUPED, "tie_word_embeddings": True}
SCALES = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 1.4 / 3**0.5,
    "logits_scaling": HIDDEN / 24,
}
MINICPM = {"scale_emb": 3, "scale_depth": 1.4, "dim_model_base": 24}
"""The same in MiniCPM's own config."""
FALCON = {
    **COMMON,
    "ffn_hidden_size": FFN,
    "activation": "relu",
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
    "alibi": False,
    "bias": False,
}
OPT = {
    **COMMON,
    "ffn_dim": FFN,
    "word_embed_proj_dim": HIDDEN,
    "init_std": 0.1,
    "activation_function": "relu",
    "pad_token_id": 0,
}
ZOO = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "llama-grouped": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED_TIED)),
    "minicpm": lambda: GraniteForCausalLM(
        GraniteConfig(**GROUPED_TIED, **SCALES, attention_multiplier=16**-0.5)
    ),
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**{**GROUPED, **SCALES}, attention_multiplier=0.4)
    ),
    "bamboo": lambda: MistralForCausalLM(MistralConfig(**{**GROUPED, "hidden_act": "drelu"})),
    "falcon-7b": lambda: FalconForCausalLM(FalconConfig(**FALCON, multi_query=True)),
    "falcon-heads": lambda: FalconForCausalLM(FalconConfig(**FALCON, multi_query=False)),
    "falcon-40b": lambda: FalconForCausalLM(
        FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2)
    ),
    "falcon-11b": lambda: FalconForCausalLM(
        FalconConfig(
            **FALCON, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1
        )
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
}
"""Every architecture of PowerInfer's that sparsecast writes, by what sets its tensors apart."""


@pytest.fixture(autouse=True, scope="session")
def _small_sample():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other_tokens, "_sample", lambda count: SAMPLE)
        yield


def random_predictors(
    folder: Path, model: str, threshold: float = 0.0, dtypes: Sequence[str] = ("f16",) * 3
) -> Path:
    """Predictors that switch many neurons off, differently for every token.

    Neuron j follows one of 8 differences of two hidden units, with a factor of its own: 24
    decisions a token that rounding could turn over instead of 3,840. Where both units are 0 the
    logit is exactly 0, which counts as active.
    """
    generator = torch.Generator().manual_seed(3)
    layers = []
    for dtype in dtypes:
        group_F = torch.randint(0, RANK // 2, (FFN,), generator=generator)
        factor_F = torch.rand(FFN, generator=generator) + 0.5
        sign_F = torch.randint(0, 2, (FFN,), generator=generator) * 2 - 1
        fc2_FR = torch.zeros(FFN, RANK)
        fc2_FR[torch.arange(FFN), group_F] = factor_F * sign_F
        fc2_FR[torch.arange(FFN), group_F + RANK // 2] = -factor_F * sign_F
        fc1_RD = torch.randn(RANK, HIDDEN, generator=generator)
        if dtype != "f16":  # rows of whole blocks
            fc1_RD = torch.cat([fc1_RD, torch.zeros(32 - RANK, HIDDEN)])
            fc2_FR = torch.cat([fc2_FR, torch.zeros(FFN, 32 - RANK)], dim=1)
        layers.append(Predictor(fc1_RD, fc2_FR, dtype).stored())
    checkpoint = Checkpoint(model)
    family, rule = family_of(checkpoint.config, model), activation_rule(checkpoint.config, model)
    manifest = PredictorManifest(
        model=model,
        fingerprint=checkpoint.fingerprint,
        convention=family.convention,
        activation=rule.name,
        activation_threshold=rule.threshold,
        hidden_size=HIDDEN,
        ffn_width=FFN,
        ffn_matrices=family.matrices,
        dtypes=list(dtypes),
        ranks=[layer.rank for layer in layers],
        calibration=[{"recall": 0.5, "predicted_sparsity": 0.5}] * LAYERS,
        recipe={},
    )
    PredictorSet(layers, threshold, manifest).save(folder)
    return folder


@pytest.fixture(scope="session")
def zoo(once, model_folder, corpus):
    """Name to a saved model of `ZOO`, trained until the FFN matters, with norms and biases that a
    lost tensor would not look like. The tokenizer is that of `model_folder`; after a name that ends
    in -bytes a byte-level one."""

    def build(path: Path) -> None:
        name = path.name
        if name.endswith("-bytes"):
            save_byte_tokenizer(path, corpus, 500)
        else:
            path.mkdir()
            for file in model_folder.glob("tokenizer*"):
                shutil.copy(file, path)
        torch.manual_seed(5)
        model = ZOO[name.removesuffix("-bytes")]()
        for key, weight in model.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.uniform_(weight, -0.3, 0.3)
            elif "norm" in key or ".ln_" in key:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        _train_a_little(model, _tokens(path, corpus))
        model.half().save_pretrained(path)
        if name == "bamboo":
            config = json.loads((path / "config.json").read_text())
            config |= {"model_type": "bamboo", "hidden_act": "relu"}
            config |= {"architectures": ["BambooForCausalLM"], "sliding_window": 4096}
            (path / "config.json").write_text(json.dumps(config))
        if name.startswith("minicpm"):
            as_minicpm(path)

    return lambda name: once(name, build)


def as_minicpm(path: Path) -> None:
    """Give a saved Granite the config of MiniCPM-S, which leaves out that embeddings are tied."""
    config = json.loads((path / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.endswith(SCALE_NAMES)}
    del config["tie_word_embeddings"]
    config |= {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], **MINICPM}
    config |= {"hidden_act": "fatrelu", "hidden_act_param": 0.05}
    config |= {"auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"}}
    (path / "config.json").write_text(json.dumps(config))


SCALE_NAMES = ("_multiplier", "logits_scaling")


def _tokens(folder: Path, corpus: Path) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(path.read_text() for path in sorted(corpus.iterdir())[:20])
    ids = torch.tensor(tokenizer(text[:200_000])["input_ids"])
    return ids[: len(ids) // 64 * 64].view(-1, 64)


def _train_a_little(model: PreTrainedModel, ids_NS: torch.Tensor) -> None:
    set_activation(model, activation_rule(model.config, "model"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(50):
        batch_BS = ids_NS[torch.arange(8 * step, 8 * step + 8) % len(ids_NS)]
        model(input_ids=batch_BS, labels=batch_BS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session", name="random_predictors")
def _random_predictors():
    return random_predictors


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory, model_folder, corpus) -> Path:
    """The small model with a byte-level vocabulary as GPT-2's: 600 tokens, then the end of text, an
    added token that is not special, and 3 rows of padding; not to be written to."""
    folder = tmp_path_factory.mktemp("bytes") / "model"
    config = LlamaConfig.from_pretrained(model_folder)
    config.vocab_size = save_byte_tokenizer(folder, corpus, 600) + 3
    torch.manual_seed(1)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def save_byte_tokenizer(folder: Path, corpus: Path, size: int) -> int:
    """Train and save it: `size` tokens, then two added ones; how many there are."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Characters of several bytes, so that some tokens are parts of them.
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizer.train_from_iterator(
        [*texts, *["\u4f60\u597d \u4f60 \U0001f600\U0001f604 \u00e4"] * 2000], trainer
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("<|a b|>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends})
    )
    return int(tokenizer.get_vocab_size())


@pytest.fixture(scope="session")
def byte_bundle(tmp_path_factory, byte_model):
    """Export it with random predictors; the bundle is not to be written to."""

    def make(dtype: str = "f16", threshold: float = 0.0) -> Path:
        folder = tmp_path_factory.mktemp("bytes")
        predictors = random_predictors(folder / "p", str(byte_model), threshold)
        cfg = ExportConfig(
            model=str(byte_model), predictors=predictors, out=folder / "b", dtype=dtype
        )
        return export(cfg).parent

    return make


@pytest.fixture(scope="session")
def predictors(tmp_path_factory, model_folder) -> Path:
    return random_predictors(tmp_path_factory.mktemp("predictors") / "p", str(model_folder))


@pytest.fixture(scope="session")
def bundle_in(tmp_path_factory, model_folder):
    """Export a bundle with predictors in the given format per layer and a model in f16 unless told
    otherwise; not to be written to."""

    def make(*dtypes: str, dtype: str = "f16") -> Path:
        folder = tmp_path_factory.mktemp("formats")
        predictors = random_predictors(folder / "p", str(model_folder), dtypes=dtypes)
        cfg = ExportConfig(
            model=str(model_folder), predictors=predictors, out=folder / "b", dtype=dtype
        )
        return export(cfg).parent

    return make


@pytest.fixture(scope="session")
def quantized(bundle_in) -> Path:
    """A bundle whose predictors are f16, q8_0 and q4_0; not to be written to."""
    return Path(bundle_in("f16", "q8_0", "q4_0"))


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory, model_folder, predictors, acts) -> Path:
    """The exported bundle; not to be written to."""
    out = tmp_path_factory.mktemp("bundle") / "b"
    return export(
        ExportConfig(
            model=str(model_folder), predictors=predictors, out=out, activations=acts.folder
        )
    ).parent


@pytest.fixture
def bundle(bundle_folder, tmp_path) -> Path:
    """A copy of the bundle that a test may damage."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def engine() -> Path:
    build = os.environ.get("POWERINFER_BUILD")
    if not build:
        pytest.skip("POWERINFER_BUILD names no PowerInfer build")
    return Path(build)


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    """The folder with llama.cpp's binaries."""
    build = os.environ.get("LLAMA_CPP_BUILD")
    if not build:
        pytest.skip("LLAMA_CPP_BUILD names no llama.cpp build")
    folder = Path(build).absolute()
    return folder / "bin" if (folder / "bin").is_dir() else folder


@pytest.fixture
def byte_copy(byte_model, tmp_path) -> Path:
    """A copy of the byte-level model that a test may change."""
    return Path(shutil.copytree(byte_model, tmp_path / "model"))


@pytest.fixture
def json_copy(model_folder, tmp_path) -> Path:
    """A copy of the sentencepiece model that has a tokenizer.json alone."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "tokenizer.model").unlink()
    return folder


@pytest.fixture
def anyones(predictors, tmp_path) -> Path:
    """The predictors as PowerInfer publishes them: without a manifest, so without a fingerprint."""
    folder = Path(shutil.copytree(predictors, tmp_path / "anyones"))
    (folder / "manifest.json").unlink()
    return folder

"""Supervised fine-tuning on chats: rows, the loss on answers, resumed runs, refusals."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsecast.core.errors import InputError
from sparsecast.core.models.loading import load_model
from sparsecast.sparsify import choose_threshold
from sparsecast.sparsify.answers import IGNORED
from sparsecast.sparsify.chats import AnswerBatches, answer_perplexity, pack_chats
from sparsecast.sparsify.run import sparsify
from sparsecast.sparsify.training import fit
from sparsecast.sparsify.training.lightning_module import Phase, SparsifyModule

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)


def chat(first: int, length: int, answer: int) -> torch.Tensor:
    """Ids `first`, `first` + 1, ..., of which the last `answer` are labelled."""
    ids = torch.arange(first, first + length, dtype=torch.int32)
    labels = ids.clone()
    labels[: length - answer] = IGNORED
    return torch.stack([ids, labels])


CHATS = [chat(10, 5, 2), chat(20, 3, 1), chat(30, 7, 3), chat(40, 8, 4), chat(50, 2, 1)]


def test_chats_stand_whole_in_rows_that_end_with_others_without_loss():
    rows = pack_chats(CHATS, 8)

    assert rows[:, 0].tolist() == [
        [10, 11, 12, 13, 14, 20, 21, 22],
        [30, 31, 32, 33, 34, 35, 36, 40],
        [40, 41, 42, 43, 44, 45, 46, 47],
        [50, 51, 10, 11, 12, 13, 14, 10],
    ]
    labelled = rows[:, 1][rows[:, 1] != IGNORED].tolist()
    assert labelled == [13, 14, 22, 34, 35, 36, 44, 45, 46, 47, 51]
    assert ((rows[:, 1] == rows[:, 0]) | (rows[:, 1] == IGNORED)).all()
    assert rows.dtype == torch.int32


def test_batches_hold_every_row_once_an_epoch_and_go_on_where_they_stopped():
    rows = pack_chats(CHATS, 8)
    batches = iter(AnswerBatches(rows, 2, seed=1))
    drawn = [next(batches) for _ in range(4)]

    epoch = torch.stack([torch.cat([pair[k] for pair in drawn[:2]]) for k in (0, 1)], 1)
    assert sorted(epoch.tolist()) == sorted(rows.tolist())
    resumed = iter(AnswerBatches(rows, 2, seed=1, first=2))
    for wanted in drawn[2:]:
        ids, labels = next(resumed)
        assert torch.equal(ids, wanted[0])
        assert torch.equal(labels, wanted[1])
        assert ids.dtype == labels.dtype == torch.int64


@pytest.fixture
def model():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, hidden_act="relu")).eval()


def nll_of_answers(model, ids, labels) -> list[float]:
    """By hand: minus the log probability of each labelled token after those before it."""
    logits = model(torch.tensor([ids])).logits[0]
    return [
        (torch.logsumexp(logits[i - 1], 0) - logits[i - 1, ids[i]]).item()
        for i in range(1, len(ids))
        if labels[i] != IGNORED
    ]


def test_the_loss_is_the_cross_entropy_over_answers_alone(model):
    rows = pack_chats(CHATS, 8).long()
    steps = {"start": 0, "stop": 9, "warmup": 0, "decay_from": 9}
    phase = Phase(name="p", **steps, l1=0.3, lr=1e-3, stages=None, answers=True)
    module = SparsifyModule(model, phase)
    targets = torch.tensor(11.0)

    whole, measured = module.loss([rows[:, 0], rows[:, 1]], targets, 1.0)
    shares = [1 / len(rows), 1 - 1 / len(rows)]
    parts = [
        module.loss([part[:, 0], part[:, 1]], targets, share)[0]
        for part, share in zip((rows[:1], rows[1:]), shares, strict=True)
    ]
    _, l1_L, *_ = module._forward(rows[:, 0], rows[:, 1])
    module.remove_hooks()

    by_hand = [x for row in rows.tolist() for x in nll_of_answers(model, *row)]
    assert len(by_hand) == 11
    expected = sum(by_hand) / len(by_hand) + 0.3 * l1_L.sum().item()
    assert whole.item() == pytest.approx(expected, rel=1e-5)
    assert sum(parts).item() == pytest.approx(expected, rel=1e-5)
    assert measured[0].item() == pytest.approx(sum(by_hand) / 11, rel=1e-5)


def test_answers_are_scored_behind_their_own_chat_alone(model, monkeypatch):
    rows = torch.cat([pack_chats([one], 8) for one in CHATS])
    monkeypatch.setattr("sparsecast.sparsify.chats.SCORED_ROWS", 2)

    found = answer_perplexity(model, rows)

    by_hand = [x for one in CHATS for x in nll_of_answers(model, *one.tolist())]
    assert found == pytest.approx(torch.tensor(by_hand).mean().exp().item(), rel=1e-5)


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    turn = '{"role": "%s", "content": "%s"}'
    line = f'{{"messages": [{turn}, {turn}]}}\n'
    path.write_text("".join(line % ("user", f"f({i})", "assistant", 1) for i in range(30)))
    return path


@pytest.fixture
def talking(dense):
    def make(**fields) -> str:
        folder = dense(**fields)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return str(folder)

    return make


@pytest.mark.parametrize(("stages", "share"), [("7b", 1.0), ("1b", 0.2)])
def test_a_run_fine_tunes_before_it_shifts_the_threshold(
    talking, options, chats, tmp_path, monkeypatch, stages, share
):
    sweep, seen = choose_threshold.sweep, []

    def swept(model, *rest):
        done = torch.load(tmp_path / ".out.work" / "supervised-fine-tuning.pt", weights_only=True)
        now = model.state_dict()
        seen.append(all(torch.equal(done["model"][name], now[name]) for name in now))
        return sweep(model, *rest)

    monkeypatch.setattr(choose_threshold, "sweep", swept)
    changes = {"sft_corpus": str(chats), "sft_tokens": 1_280, "sft_lr": 1e-2}
    cfg = options(model=talking(), **changes, stages=stages, l1=0.5)

    sparsify(cfg)

    assert seen == [True]
    facts = json.loads((cfg.out / "sparsify.json").read_text())
    assert list(facts["held_out"]) == [
        "ProSparse before the shift",
        "fine-tuned",
        "ProSparse after the shift",
    ]
    tuned = facts["fine_tuning"]
    assert (tuned["corpus"], tuned["tokens"]) == ("chats.jsonl", 1_280)
    assert (tuned["l1"], tuned["lr"]) == (pytest.approx(0.5 * share), 1e-2)
    answers = tuned["answer_perplexity"]
    assert answers["after"] < 0.5 * answers["before"]
    assert answers["saved"] == pytest.approx(answers["after"], rel=0.05)
    card = (cfg.out / "README.md").read_text()
    assert "fine-tuned on 1,280 tokens of chats, `chats.jsonl`" in card
    assert f"{answers['after']:.3f} after, and is {answers['saved']:.3f} in the model as" in card
    assert (cfg.out / "chat_template.jinja").read_text() == TEMPLATE


def test_interrupted_in_fine_tuning_it_ends_as_an_uninterrupted_run(
    talking, options, chats, tmp_path, monkeypatch
):
    changes = {"model": talking(), "sft_corpus": str(chats), "sft_tokens": 256}
    whole = sparsify(options(**changes, out=tmp_path / "whole"))
    cfg = options(**changes, out=tmp_path / "parts")
    monkeypatch.setattr(fit, "CHECKPOINT_STEPS", 1)
    step = SparsifyModule.training_step

    def interrupted(self, batch, index):
        if self.phase.answers and self.global_step == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    with monkeypatch.context() as patched:
        patched.setattr(SparsifyModule, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sparsify(cfg)
    chats.rename(tmp_path / "moved")  # the rows are in the work folder
    chats.write_text((tmp_path / "moved").read_text())
    torch.rand(7)
    parts = sparsify(cfg)

    a, b = (json.loads((out / "sparsify.json").read_text()) for out in (whole, parts))
    assert a == b
    a, b = (load_model(str(out), device="cpu")[0].state_dict() for out in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_cannot_be_fine_tuned_on_is_refused_before_training(
    dense, talking, options, chats, tmp_path
):
    source = str(dense(initializer_range=0.1))
    with pytest.raises(InputError, match="its tokenizer has no chat template"):
        sparsify(options(model=source, sft_corpus=str(chats)))
    source = talking()
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "x = {i}"}}\n' for i in range(9)))
    with pytest.raises(InputError, match="no chat for train and held-out .*a text, expected a"):
        sparsify(options(model=source, sft_corpus=str(texts)))
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(InputError, match=r"--sft-corpus: 2 different document\(s\)"):
        sparsify(options(model=source, sft_corpus=str(few)))
    with pytest.raises(InputError, match="--sft-corpus -: sparsify reads its corpus more than"):
        sparsify(options(model=source, sft_corpus="-"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.work").exists()


def test_fine_tuning_that_diverges_names_its_own_learning_rate(talking, options, chats, tmp_path):
    with pytest.raises(InputError, match=r"--sft-lr 1e\+30: training diverged .* smaller --sft-lr"):
        sparsify(options(model=talking(), sft_corpus=str(chats), sft_tokens=256, sft_lr=1e30))
    assert not (tmp_path / ".out.work").exists()


def test_chats_that_cannot_be_used_are_counted(talking, options, chats, capsys):
    alone = '{"messages": [{"role": "user", "content": "Is anybody there? %d"}]}\n'
    chats.write_text("".join(alone % i for i in range(9)) + chats.read_text())

    sparsify(options(model=talking(), sft_corpus=str(chats), sft_tokens=640))

    assert re.search(
        r"[3-9] of 39 rows cannot be used .*: a chat without a turn of the assistant",
        capsys.readouterr().err,
    )


def test_a_model_that_was_made_without_these_options_is_kept(dense, options, capsys):
    cfg = options(model=str(dense()))
    record = sparsify(cfg) / "sparsify.json"
    facts = json.loads(record.read_text())
    for name in ("stages", "sft_corpus", "sft_tokens", "sft_steps", "sft_lr"):
        facts["options"].pop(name, None)
    record.write_text(json.dumps(facts))

    assert sparsify(cfg).is_dir()

    assert "already sparsified with these options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"sft_tokens": 640}, "--sft-tokens: is for --sft-corpus"),
        ({"sft_lr": 1e-4}, "--sft-lr: is for --sft-corpus"),
        ({"sft_corpus": "c", "sft_lr": 0}, r"--sft-lr: must be in \(0, inf\)"),
        ({"sft_corpus": "c", "sft_tokens": 63}, "--sft-tokens: got 63, expected at least 64"),
        ({"sft_corpus": "c", "preset": "micro", "model": None}, "--preset has no chat template"),
    ],
)
def test_options_that_do_not_go_together_are_named(options, changes, match):
    with pytest.raises(InputError, match=match):
        options(**{"model": "m"} | changes)


@pytest.mark.parametrize(("tokens", "steps"), [(64 * 95_000, 6_000), (64, 1), (64 * 100, 6)])
def test_the_default_is_a_share_of_the_steps(options, tokens, steps):
    assert options(model="m", sft_corpus="c", tokens=tokens).sft_steps == steps
    assert options(model="m", sft_corpus="c", lr=1e-3).peak_sft_lr == pytest.approx(1e-4)
    assert options(model="m", tokens=tokens).sft_steps == 0

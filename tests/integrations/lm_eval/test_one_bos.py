"""One BOS in whatever the model is fed, whatever the tokenizer's files say."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F

pytest.importorskip("lm_eval")

from lm_eval.models.huggingface import HFLM

from sparsecast.core.errors import InputError
from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.loading import load_model
from sparsecast.core.models.location import TINY_PROSPARSE
from sparsecast.core.tokenizers.loading import load_tokenizer
from sparsecast.integrations.lm_eval.model import OneBosLM

BOS, EOS = 1, 2
KINDS = {
    "adds none": "$A",
    "adds one": "<s> $A",
    "adds two": "<s> <s> $A",
    "adds eos": "<s> $A </s>",
}
LONG = "".join(f"def add{i}(a, b):\n    return a + {i * i}\n" for i in range(8))
PAIRS = [("import os\nimport", " sys"), ("", "import os"), ("for i in ", "range(3):")]


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-prosparse", device="cpu")[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Copies of tiny-prosparse's files whose tokenizers differ in what they add."""
    made = {}
    for kind, single in KINDS.items():
        folder = tmp_path_factory.mktemp("kind") / "model"
        shutil.copytree(TINY_PROSPARSE, folder)
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        ids = [("<s>", BOS), ("</s>", EOS)]
        backend.post_processor = TemplateProcessing(single=single, special_tokens=ids)
        backend.save(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"add_bos_token": kind != "adds none", "add_eos_token": kind == "adds eos"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        made[kind] = folder
    return made


def tokenizer_of(folder):
    return load_tokenizer(Checkpoint(str(folder)))


@pytest.fixture
def fed(model):
    """The rows of ids that the model is fed, without padding and without decoding steps."""
    rows = []

    def record(_, args, kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:  # what came before is in the cache
            return
        keep = ids != 0 if mask is None else mask.bool()  # lm-eval pads on the right with 0
        rows.extend(row[kept].tolist() for row, kept in zip(ids, keep, strict=True))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    yield rows
    handle.remove()


def request(*args):
    return SimpleNamespace(args=args, task_name="t")


def ask(lm: HFLM):
    """Answers to requests of all three kinds."""
    options = {"until": ["\n"], "max_gen_toks": 4}
    return (
        lm.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True),
        lm.loglikelihood_rolling([request(LONG), request("import os")], disable_tqdm=True),
        lm.generate_until([request(text, options) for text in ("import", LONG)], disable_tqdm=True),
    )


def test_every_kind_of_tokenizer_feeds_one_bos_and_the_same_ids(model, folders, fed):
    answers, rows = {}, {}
    for kind, folder in folders.items():
        tokenizer = tokenizer_of(folder)
        added = [BOS] * KINDS[kind].count("<s>")
        ids = tokenizer("import")["input_ids"]
        assert ids[: len(added) + 1].count(BOS) == len(added)  # they do differ
        assert (ids[-1] == EOS) == (kind == "adds eos")
        answers[kind] = ask(OneBosLM(model, tokenizer, batch_size=2, max_length=48))
        rows[kind], fed[:] = list(fed), []
    assert len(rows["adds none"]) > 8
    for kind in KINDS:
        assert [row[:1] for row in rows[kind]] == [[BOS]] * len(rows[kind])
        assert [row.count(BOS) for row in rows[kind]] == [1] * len(rows[kind])
        assert not any(EOS in row for row in rows[kind])
        assert max(map(len, rows[kind])) <= 48
        assert rows[kind] == rows["adds none"]
        assert answers[kind] == answers["adds none"]


def test_stock_lm_eval_does_not(model, folders, fed):
    """What this is for: stock rolling has none, or two, where the tokenizer decides."""
    ask(HFLM(pretrained=model, tokenizer=tokenizer_of(folders["adds one"]), max_length=48))
    counts = {row.count(BOS) for row in fed}
    assert {0, 2} <= counts


def test_dense_equals_stock_with_bos_forced(model, folders):
    """Rolling by stock has one BOS where the text is one window and the tokenizer adds none."""
    ours = OneBosLM(model, tokenizer_of(folders["adds none"]), batch_size=2)
    stock = HFLM(
        pretrained=model,
        tokenizer=tokenizer_of(folders["adds one"]),
        add_bos_token=True,
        batch_size=2,
    )
    bare = HFLM(pretrained=model, tokenizer=tokenizer_of(folders["adds none"]), batch_size=2)
    scores, rolled, texts = ask(ours)
    want_scores, _, want_texts = ask(stock)
    _, want_rolled, _ = ask(bare)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in want_scores]
    for (found, _), (want, _) in zip(scores, want_scores, strict=True):
        assert found == pytest.approx(want, rel=1e-5)
    assert rolled == pytest.approx(want_rolled, rel=1e-5)
    assert texts == want_texts


def log_probability(model, row: list[int], last: int) -> float:
    """Of the last ids of a row given those before them."""
    with torch.inference_mode():
        logits = model(torch.tensor([row])).logits[0].double()
    logp = F.log_softmax(logits, dim=-1)
    return sum(logp[i - 1, row[i]].item() for i in range(len(row) - last, len(row)))


def test_a_request_is_what_plain_torch_computes(model, folders):
    lm = OneBosLM(model, tokenizer_of(folders["adds eos"]), batch_size=3)
    backend = Backend.from_file(str(TINY_PROSPARSE / "tokenizer.json"))
    got = lm.loglikelihood([request(*pair) for pair in PAIRS], disable_tqdm=True)
    for (context, answer), (value, _) in zip(PAIRS, got, strict=True):
        whole = backend.encode(context + answer, add_special_tokens=False).ids
        front = backend.encode(context.rstrip(), add_special_tokens=False).ids if context else []
        want = log_probability(model, [BOS, *whole], len(whole) - len(front))
        assert value == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("length", [16, 17, 40])
def test_rolling_windows_are_what_plain_torch_computes(model, folders, length):
    """Every token is predicted once, and the last window reaches back as far as it can."""
    lm = OneBosLM(model, tokenizer_of(folders["adds one"]), batch_size=4, max_length=length)
    backend = Backend.from_file(str(TINY_PROSPARSE / "tokenizer.json"))
    ids = backend.encode(LONG, add_special_tokens=False).ids
    assert len(ids) > 3 * length
    step, want, done = length - 1, 0.0, 0
    while done < len(ids):
        end = min(done + step, len(ids))
        row = [BOS, *ids[max(0, end - step - (done > 0)) : end]]
        want += log_probability(model, row, end - done)
        done = end
    (got,) = lm.loglikelihood_rolling([request(LONG)], disable_tqdm=True)
    assert got == pytest.approx(want, rel=1e-5)


def test_a_context_is_cut_behind_bos(model, folders, fed):
    lm = OneBosLM(model, tokenizer_of(folders["adds none"]), max_length=20)
    ((value, _),) = lm.loglikelihood([request(LONG, " import os")], disable_tqdm=True)
    ids = lm.tok_encode(LONG.rstrip() + LONG[len(LONG.rstrip()) :] + " import os")
    assert fed == [[BOS, *ids[-20:-1]]]
    assert lm.cut == 1
    answer = len(ids) - len(lm.tok_encode(LONG.rstrip()))
    assert value == pytest.approx(log_probability(model, [BOS, *ids[-20:]], answer), rel=1e-5)
    with pytest.raises(InputError, match="an answer longer than the model can read"):
        lm.loglikelihood([request("a", LONG)], disable_tqdm=True)


def test_bos_that_a_text_spells_is_text(model, folders, fed):
    lm = OneBosLM(model, tokenizer_of(folders["adds none"]), batch_size=1)
    lm.loglikelihood([request("<s>import", " os"), request("a <s> b", " <s>")], disable_tqdm=True)
    lm.loglikelihood_rolling([request("x = '<s>'")], disable_tqdm=True)
    assert [row.count(BOS) for row in fed] == [1, 1, 1]
    assert sum("<s>" in lm.tokenizer.decode(row[1:]) for row in fed) == 2


TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_that_writes_bos_gets_no_second_one(model, folders, fed):
    tokenizer = tokenizer_of(folders["adds one"])
    tokenizer.chat_template = TEMPLATE.replace("<s>", "{% if loop.first %}<s>{% endif %}")
    lm = OneBosLM(model, tokenizer, batch_size=2)
    prompt = lm.apply_chat_template([{"role": "user", "content": "import"}])
    assert prompt.startswith("<s>user: import")
    lm.loglikelihood([request(prompt, "os")], disable_tqdm=True)
    lm.generate_until([request(prompt, {"until": ["\n"], "max_gen_toks": 2})], disable_tqdm=True)
    assert [row[0] for row in fed] == [BOS, BOS]
    assert [row.count(BOS) for row in fed] == [1, 1]


def test_what_a_template_writes_between_turns_stays(model, folders, fed):
    tokenizer = tokenizer_of(folders["adds none"])
    tokenizer.chat_template = TEMPLATE
    lm = OneBosLM(model, tokenizer)
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    lm.loglikelihood([request(lm.apply_chat_template(turns), " y")], disable_tqdm=True)
    assert [row.count(BOS) for row in fed] == [3]
    assert fed[0][:2].count(BOS) == 1


def test_without_bos_lm_evals_rule_holds(model, folders, fed):
    """Contexts stand alone; EOS comes before an empty one and before a text's first window."""
    ours, stock = tokenizer_of(folders["adds none"]), tokenizer_of(folders["adds none"])
    ours.bos_token = stock.bos_token = None
    answers = ask(OneBosLM(model, ours, batch_size=2, max_length=48))
    found, fed[:] = list(fed), []
    wanted = ask(HFLM(pretrained=model, tokenizer=stock, batch_size=2, max_length=48))
    assert not any(BOS in row for row in found)
    assert sum(row[0] == EOS for row in found) == 3
    assert sorted(found) == sorted(fed)
    assert answers[1] == pytest.approx(wanted[1], rel=1e-5)
    assert answers[2] == wanted[2]


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused(model, folders):
    tokenizer = tokenizer_of(folders["adds none"])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="has neither BOS nor EOS"):
        OneBosLM(model, tokenizer)


def test_a_model_that_overflows_is_one_line(model, folders):
    lm = OneBosLM(model, tokenizer_of(folders["adds none"]))
    weight = model.model.norm.weight
    old = weight.data.clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(InputError, match="the model itself overflows"):
            lm.loglikelihood([request("a", " b")], disable_tqdm=True)
    finally:
        weight.data.copy_(old)

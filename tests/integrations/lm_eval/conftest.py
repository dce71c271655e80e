"""Tasks of lm-eval in local files, and predictors of tiny-prosparse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsecast.predictors.checkpoint import PredictorSet
from sparsecast.predictors.predictor import Predictor

CHOICES = [
    {"q": "import os\nimport", "choices": ["sys", "for", "7"], "gold": 0},
    {"q": "def add(a, b):\n    return a +", "choices": ["(", "b", "import"], "gold": 1},
    {"q": "for i in", "choices": ["range", "while"], "gold": 0},
    {"q": "", "choices": ["import", "zebra"], "gold": 1},
]
TEXTS = [
    {"text": "def add(a, b):\n    return a + b\n"},
    {"text": "import os\nimport sys\n\n\nfor name in sys.argv:\n    print(os.stat(name))\n"},
]
PROMPTS = [
    {"q": "def f(x):\n    return", "a": "x"},
    {"q": "for i in range(10):\n    print(i)\nfor j in", "a": "range"},
]
SHAPES = {
    "local_choice": (CHOICES, "multiple_choice", "acc mean true"),
    "local_text": (TEXTS, "loglikelihood_rolling", "word_perplexity weighted_perplexity false"),
    "local_answer": (PROMPTS, "generate_until", "exact_match mean true"),
}
FIELDS = {
    "multiple_choice": {
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "fewshot_split": "test",
    },
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{text}}"},
    "generate_until": {
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "fewshot_split": "test",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
    },
}


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """One task of each kind of request, as .yaml (JSON is YAML), with its data beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, (rows, kind, metric) in SHAPES.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        metric_name, aggregation, better = metric.split()
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(data)},
                "cache_dir": str(folder / "cache"),
            },
            "test_split": "test",
            "output_type": kind,
            **FIELDS[kind],
            "metric_list": [
                {
                    "metric": metric_name,
                    "aggregation": aggregation,
                    "higher_is_better": better == "true",
                }
            ],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="session")
def predictors(tmp_path_factory) -> Path:
    """Random predictors of tiny-prosparse that drop many neurons."""
    generator = torch.Generator().manual_seed(0)
    layers = [
        Predictor(
            torch.randn(8, 256, generator=generator).half(),
            torch.randn(1024, 8, generator=generator).half(),
        )
        for _ in range(6)
    ]
    folder = tmp_path_factory.mktemp("predictors") / "pred"
    PredictorSet(layers, 0.0, None).save(folder)
    return folder

"""The example notebook holds its outputs, names no machine, and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "model_to_report.ipynb"
MAX_BYTES = 60_000


def outputs_of(cell: dict[str, Any]) -> list[str]:
    """The text, table or figure that a cell shows."""
    shown = []
    for output in cell["outputs"]:
        assert output["output_type"] == "execute_result", output  # no warning and no error
        data = output["data"]
        best = data.get("text/markdown") or data.get("image/svg+xml") or data["text/plain"]
        shown.append("".join(best))
    return shown


def check_outputs(notebook: dict[str, Any]) -> None:
    """Check what the code cells show, in their order."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    shown = [outputs_of(cell) for cell in code]
    assert [len(outputs) for outputs in shown] == [0, 1, 1, 1, 1, 1, 1, 1]
    splits, recalls, perplexities, table, figure, verdict, text = [one for (one,) in shown[1:]]
    assert splits == "{'train': 36000, 'calibration': 2000, 'held-out': 2000}"
    assert recalls == str([0.95] * 6)
    values = {k: float(v) for k, v in re.findall(r"'(\w+)': ([\d.]+)", perplexities)}
    assert values.keys() == {"dense", "exact", "predicted", "bundle"}
    assert values["exact"] == values["dense"] < values["predicted"] < 1.05 * values["dense"]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert [row[0] for row in rows] == ["layer", "---", *"012345"]
    recall, traffic = rows[0].index("recall"), rows[0].index("traffic")
    assert all(float(row[recall]) > 0.9 and float(row[traffic]) < 0.5 for row in rows[2:])
    assert "<svg" in figure
    assert "predicted sparsity" in figure
    assert verdict.strip("'\"").startswith("Worth it: ")
    assert len(text) > 24


def test_the_outputs_are_in_the_notebook_and_name_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < MAX_BYTES
    assert not re.findall(r"/(?:home|root|tmp|usr|Users)/|site-packages|\.venv", text)
    check_outputs(json.loads(text))


@pytest.mark.slow
def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    check_outputs(notebook)

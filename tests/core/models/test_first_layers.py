"""What the first layers of a model say of all of it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsecast.core.models.checkpoint import Checkpoint
from sparsecast.core.models.first_layers import keeps_own_copy

F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("said", ["float32", "bfloat16", None])
@pytest.mark.parametrize("stored", [F32, BF16])
def test_the_files_decide_whether_weights_are_mapped(model_folder, tmp_path, said, stored):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": said}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    of_dtype = {name: w.to(F32 if w.dim() == 1 else stored) for name, w in weights.items()}
    save_file(of_dtype, folder / "model.safetensors", {"format": "pt"})
    for dtype in (F32, BF16):
        assert keeps_own_copy(Checkpoint(str(folder)), dtype) == (dtype != stored)


def test_a_folder_without_weights_goes_by_its_config(model_folder, tmp_path):
    config = json.loads((model_folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    config.pop("torch_dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert keeps_own_copy(Checkpoint(str(tmp_path)), F32)
    assert not keeps_own_copy(Checkpoint(str(tmp_path)), BF16)

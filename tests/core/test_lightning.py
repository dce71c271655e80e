"""Only torchrun makes a process one of several, whatever a cluster has put into its environment."""

from __future__ import annotations

import lightning as L
import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sparsecast.core.lightning import cluster_environment

SRUN = {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
LSF = {
    "LSB_JOBID": "7",
    "LSB_DJOB_RANKFILE": "/dev/null",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_SIZE": "2",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "0",
}


@pytest.mark.parametrize("variables", [{"SLURM_NTASKS": "4"}, SRUN, LSF], ids=str)
def test_an_allocation_does_not_multiply_a_process(monkeypatch, variables):
    monkeypatch.setattr(rank_zero_only, "rank", 3)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    trainer = L.Trainer(
        plugins=[cluster_environment()], accelerator="cpu", devices=1, logger=False, barebones=True
    )

    assert (trainer.world_size, trainer.global_rank) == (1, 0)
    assert rank_zero_only.rank == 0


def test_torchrun_inside_an_allocation_is_torchrun(monkeypatch):
    for name, value in {**SRUN, **TORCHRUN}.items():
        monkeypatch.setenv(name, value)

    found = cluster_environment()

    assert (found.world_size(), found.global_rank()) == (2, 1)

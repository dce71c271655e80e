"""What launched this process, as Lightning's trainers are told."""

from __future__ import annotations

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment


def cluster_environment() -> ClusterEnvironment:
    """For `Trainer(plugins=[launcher()])`: torchrun where it was used, else this process alone.

    Lightning would also find SLURM, LSF and MPI in the environment. Inside an allocation their
    variables stand there whether or not they launched this process, and it would then count tasks
    that do not exist.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    alone = LightningEnvironment()
    alone.set_global_rank(0)  # SLURM_PROCID has already told Lightning's loggers another one
    return alone

"""Train one model on several processes, each with a share of its weights, gradients and moments.

FSDP2: a decoder layer's weights are gathered before the layer runs and let go behind it, and its
gradients are averaged over the processes on the way back. Embedding, last norm and head are one
more such group. What leaves this file is whole: weights, checkpoints and the optimizer's state have
the names and shapes that they have in one process, so a run resumes on any number of processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sparsecast.core.distributed import DistributedContext
from sparsecast.sparsify.training.lightning_module import SparsifyModule

FOREVER = timedelta(days=7)
"""The leading process may measure and save for hours before the next phase."""


def without_weights(model: nn.Module, *others: Any) -> Any:
    """Copy a model and what refers to its parts.

    The copy's parameters have no values (device meta), its buffers do.
    """
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
    return copy.deepcopy((model, *others), empty)


class ShardedModule(SparsifyModule):
    """Train a model of `without_weights`, filled with the weights of the leading process."""

    _sharded = True

    def __init__(
        self,
        *args: Any,
        context: DistributedContext,
        source: nn.Module | None,
        **kwargs: Any,
    ) -> None:
        """`source` has the weights, on the leading process alone."""
        super().__init__(*args, **kwargs)
        self._context = context
        self._sources = [source]  # a module as an attribute would be trained

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        for layer in self._layers:
            fully_shard(layer, mesh=mesh)
        root: Any = fully_shard(_Root(self.model, self._forward), mesh=mesh)
        root.to_empty(device=self.trainer.strategy.root_device)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])
        self._measured = root.__call__
        self._reshard = root.reshard
        source = self._sources[0]
        full = {} if source is None else dict(source.named_parameters())
        for name, weight in self.model.named_parameters():
            spread(full.get(name), weight)

    def mean_nll(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Compute as in one process; FSDP2 would keep the root's weights for a backward pass."""
        found = super().mean_nll(ids_BS, labels_BS)
        self._reshard()
        return found

    def _average(self, values: Tensor) -> Tensor:
        assert self.device_mesh is not None
        group = self.device_mesh["data_parallel"].get_group()
        torch.distributed.all_reduce(values, group=group)
        return values / self._context.size

    def _restore(self, optimizer: Optimizer) -> None:
        spread_state(self._optimizer_state, optimizer, self._context)

    def gather(self) -> None:
        """Copy the weights into `source` on the leading process; every process calls this."""
        source = self._sources[0]
        full = {} if source is None else dict(source.named_parameters())
        for name, weight in self.model.named_parameters():
            value = whole(weight.detach(), keep=self._context.leads)
            if value is not None:
                full[name].data.copy_(value)


class _Root(nn.Module):
    """The module that FSDP2 sees as a whole: a step's forward pass with its loss."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, *args: Any) -> Any:
        return self._forward(*args)


def local(value: Tensor) -> Tensor:
    """Return the part of a tensor that this process has."""
    return value.to_local() if isinstance(value, DTensor) else value


def whole(value: Any, *, keep: bool) -> Any:
    """Gather a sharded tensor onto the CPU; None where it is not kept. Others stay as they are."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


@torch.no_grad()
def spread(full: Tensor | None, sharded: Tensor) -> None:
    """Fill a sharded tensor with the whole one of the leading process, in place."""
    assert isinstance(sharded, DTensor)
    if full is None or full.is_meta:
        on_device = torch.empty(sharded.shape, dtype=sharded.dtype, device=sharded.device)
    else:
        on_device = full.to(sharded.device, sharded.dtype)
    sharded.copy_(distribute_tensor(on_device, sharded.device_mesh, sharded.placements))


def whole_state(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Gather the state of an optimizer; its tensors are None where it is not kept."""
    found = {
        number: {key: whole(value, keep=keep) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": found}


def spread_state(
    full: Mapping[str, Any] | None, optimizer: Optimizer, context: DistributedContext
) -> None:
    """Load the whole state of the leading process, if it has one, into a sharded optimizer."""
    mine = full if context.leads else None
    shared = context.share(None if mine is None else _without_tensors(mine))
    if shared is None:
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, values in shared["state"].items():
        for key in [key for key, value in values.items() if value is None]:
            values[key] = torch.zeros_like(weights[number])
            spread(None if mine is None else mine["state"][number][key], values[key])
    optimizer.load_state_dict(shared)


def _without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the tensors of an optimizer's state by None, but copy single numbers."""

    def small(value: Tensor) -> Tensor | None:
        return None if value.dim() else value.cpu().clone()  # AdamW counts its steps in place

    found = {
        number: {key: small(value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": found}


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy, with checkpoints as one process writes them."""

    def __init__(self, context: DistributedContext) -> None:
        super().__init__(context.size, 1, save_distributed_checkpoint=False, timeout=FOREVER)
        self._context = context

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        gathered: dict[int, Any] = {}  # tied weights once
        found = {}
        for name, value in self.lightning_module.state_dict(keep_vars=True).items():
            if id(value) not in gathered:
                gathered[id(value)] = whole(value.detach(), keep=self._context.leads)
            found[name] = gathered[id(value)]
        return found

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole_state(optimizer.state_dict(), keep=self._context.leads)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(
            Path(checkpoint_path), map_location="cpu", mmap=True, weights_only=True
        )
        return found

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        for name, weight in self.lightning_module.named_parameters():
            spread(checkpoint["state_dict"][name] if self._context.leads else None, weight)
        for name, buffer in self.lightning_module.named_buffers():
            if name in checkpoint["state_dict"]:
                buffer.copy_(checkpoint["state_dict"][name])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        spread_state(checkpoint["optimizer_states"][0], self.optimizers[0], self._context)

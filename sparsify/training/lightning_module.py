"""The Lightning module of ProSparse: language modeling loss plus a progressive L1 term on x1.

    loss = cross entropy + lambda(t) * sum over layers of mean |x1|

The mean is over tokens and neurons, so that the term does not grow with the batch, the length of
its sequences or the width of the FFN; the sum, so that a layer's share does not shrink with the
number of layers. ProSparse's paper does not say over what it reduces the norm, so its lambdas
cannot be used here: the last one is an option, and the published ones give the others relative to
it.

Shape letters: B batch, S sequence, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsecast.core.models.families import family_of
from sparsecast.sparsify.training.cross_entropy import IGNORED, head_of, summed_nll
from sparsecast.sparsify.training.raised_threshold import BELOW_WEIGHT, RaisedThreshold
from sparsecast.sparsify.training.schedule import l1_share, lr_share
from sparsecast.sparsify.training.stages import TABLES, StageTable


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase of training. Steps are counted from the start of the run or of fine-tuning."""

    name: str
    start: int
    stop: int
    l1: float
    """Final weight of the L1 term; 0 disables it."""
    lr: float
    warmup: int
    decay_from: int
    """Step at which the learning rate starts to fall."""
    stages: StageTable | None = TABLES["7b"]
    """How the L1 term's weight grows to `l1`; None: it is constant."""
    answers: bool = False
    """Train on the answers of chats alone."""

    @property
    def lr_option(self) -> str:
        """The option that sets `lr`."""
        return "--sft-lr" if self.answers else "--lr"

    def l1_at(self, step: int) -> float:
        """Return the L1 term's weight at a step of this phase, the first being 0."""
        if self.stages is None:
            return self.l1
        return self.l1 * l1_share(step + 1, self.stop - self.start, self.stages)


class SparsifyModule(L.LightningModule):
    """Train `model` in place through one phase."""

    measured: Tensor
    """(2 + L,), of the last step: NLL, the sum of the mean |x1|, and shares of zeros in x1."""
    l1_weight: float
    """lambda(t) of the last step."""

    def __init__(
        self,
        model: PreTrainedModel,
        phase: Phase,
        optimizer_state: dict[str, Any] | None = None,
        compile: bool = False,
        raised: RaisedThreshold | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.phase = phase
        self.raised = raised
        self._optimizer_state = optimizer_state
        self._x1_means: list[Tensor] = []
        self._x1_zeros: list[Tensor] = []
        family = family_of(model.config, "model")
        self._handles = [
            layer.get_submodule(family.x1_reader).register_forward_pre_hook(self._on_x1)
            for layer in family.decoder_layers(model)
        ]
        self._measured = torch.compile(self._forward) if compile else self._forward

    def remove_hooks(self) -> None:
        """Remove the forward hooks, which would keep later autograd graphs in memory."""
        for handle in self._handles:
            handle.remove()

    def _on_x1(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x1 = args[0]
        self._x1_means.append(x1.abs().mean(dtype=torch.float32))
        self._x1_zeros.append((x1.detach() == 0).float().mean())

    def _forward(
        self, ids_BS: Tensor, labels_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Compute the mean NLL, and of each layer the mean |x1| and the share of zeros in x1.

        With a raised threshold also the sum over layers of its term, and gates of all layers.

        Args:
            labels_BS: What each place should hold, -100 where there is no loss. Unset: the ids.
        """
        labels_BS = ids_BS if labels_BS is None else labels_BS
        self._x1_means, self._x1_zeros = [], []
        if self.raised is not None:
            self.raised.records = []
        hidden_BSD = self.model.base_model(ids_BS[:, :-1], use_cache=False).last_hidden_state
        target_BS = labels_BS[:, 1:]
        targets = (target_BS != IGNORED).sum().clamp(min=1)
        nll = summed_nll(hidden_BSD, head_of(self.model), target_BS) / targets
        about_gates = None
        if self.raised is not None:
            about_gates = self.raised.recorded()
        return nll, torch.stack(self._x1_means), torch.stack(self._x1_zeros), about_gates

    def training_step(self, batch: Tensor | Sequence[Tensor], _: int) -> Tensor:
        """Compute the loss of a batch of ids, or of ids and labels."""
        parts = (batch,) if isinstance(batch, Tensor) else batch
        nll, l1_L, zeros_L, about_gates = self._measured(*parts)
        l1 = l1_L.sum()
        self.l1_weight = weight = self.phase.l1_at(self.global_step)
        loss = nll + weight * l1
        if self.raised is not None and about_gates is not None:
            below, gates_K = about_gates
            loss = loss + BELOW_WEIGHT * below
            self.raised.move(self.global_step, gates_K, zeros_L.mean())
        self.measured = torch.cat([torch.stack([nll, l1]), zeros_L]).detach()
        if self.global_step % 50 == 0:
            self.log("nll", nll.detach(), prog_bar=True)
            self.log("mean |x1|", l1.detach(), prog_bar=True)
            self.log("sparsity", zeros_L.mean(), prog_bar=True)
        return loss

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        # Lightning refuses to clip with fused optimizers, although bf16 needs no unscaling.
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.dim() > 1]
        plain = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(
            groups, lr=self.phase.lr, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        if self._optimizer_state is not None:
            # AdamW updates its state in place, and the next branch starts from the same state.
            optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] = self.phase.lr

        def share(step: int) -> float:
            p = self.phase
            return lr_share(p.start + step, warmup=p.warmup, decay_from=p.decay_from, total=p.stop)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

"""The Lightning module: language modeling loss, plus ProSparse's L1 term or a threshold's term.

    loss = cross entropy + lambda(t) * sum over layers of mean |x1|

With a raised threshold lambda is 0, and the threshold's module names the term. The mean is over
tokens and neurons, so that the term does not grow with the batch, the length of its sequences or
the width of the FFN; the sum, so that a layer's share does not shrink with the number of layers.
ProSparse's paper does not say over what it reduces the norm, so its lambdas cannot be used here:
the last one is an option, and the published ones give the others relative to it.

Shape letters: B batch, S sequence, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint
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
    _sharded = False
    """Whether `_measured` alone has the weights at hand."""

    def __init__(
        self,
        model: PreTrainedModel,
        phase: Phase,
        optimizer_state: dict[str, Any] | None = None,
        compile: bool = False,
        micro_batch: int | None = None,
        checkpoint_activations: bool = False,
        raised: RaisedThreshold | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.phase = phase
        self.raised = raised
        self._optimizer_state = optimizer_state
        self._micro_batch = micro_batch
        self._gates: list[Tensor] = []
        """Of each part of the last step, gates of all layers."""
        self._measuring = False
        """Whether a forward pass is under way, and not its recomputation."""
        family = family_of(model.config, "model")
        self._layers: list[Any] = list(family.decoder_layers(model))
        self._readers: list[Any] = [layer.get_submodule(family.x1_reader) for layer in self._layers]
        self._handles = [reader.register_forward_pre_hook(self._on_x1) for reader in self._readers]
        self._wrapped = self._layers if checkpoint_activations or compile else []
        for layer in self._wrapped:
            layer.forward = (
                partial(checkpoint, layer.forward, use_reentrant=False)
                if checkpoint_activations
                # One by one: layers of a kind share a compiled graph, however many they are.
                else torch.compile(layer.forward)
            )
        self._measured: Any = self._forward

    def remove_hooks(self) -> None:
        """Leave the model as it was; hooks would keep later autograd graphs in memory."""
        for handle in self._handles:
            handle.remove()
        for reader in self._readers:
            vars(reader).pop("measured", None)
        for layer in self._wrapped:
            del layer.forward

    def _on_x1(self, reader: Any, args: tuple[Tensor, ...]) -> None:
        x1 = args[0]
        about_gates = None if self.raised is None else self.raised.take_record()
        # A recomputation must repeat every operation, but what it measures is known already.
        measured = x1.abs().mean(dtype=torch.float32), (x1.detach() == 0).float().mean()
        if self._measuring:
            # On the module and not in a list, whose length would be part of a compiled graph.
            reader.measured = (*measured, about_gates)

    def _forward(
        self, ids_BS: Tensor, labels_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Compute the summed NLL, and of each layer the mean |x1| and the share of zeros in x1.

        With a raised threshold also the sum over layers of its term, and gates of all layers.

        Args:
            labels_BS: What each place should hold, -100 where there is no loss. Unset: the ids.
        """
        labels_BS = ids_BS if labels_BS is None else labels_BS
        if self.raised is not None:
            self.raised.length = ids_BS.shape[1] - 1
        self._measuring = True
        hidden_BSD = self.model.base_model(ids_BS[:, :-1], use_cache=False).last_hidden_state
        self._measuring = False
        means, zeros, about_gates = zip(*(reader.measured for reader in self._readers), strict=True)
        for reader in self._readers:
            reader.measured = None  # it would keep the graph of this step
        nll = summed_nll(hidden_BSD, head_of(self.model), labels_BS[:, 1:])
        about = None
        if self.raised is not None:
            below, gates = zip(*about_gates, strict=True)
            about = torch.stack(below).sum(), torch.cat(gates)
        return nll, torch.stack(means), torch.stack(zeros), about

    def training_step(self, batch: Tensor | Sequence[Tensor], _: int) -> Tensor:
        """Compute the loss of a batch of ids, or of ids and labels."""
        whole = [batch] if isinstance(batch, Tensor) else list(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        size = len(whole[0])
        *earlier, last = zip(
            *(torch.split(x, self._micro_batch or size) for x in whole), strict=True
        )
        targets = self._average((whole[-1][:, 1:] != IGNORED).sum().float()).clamp(min=1)
        self._gates = []
        value = measured = torch.zeros((), device=whole[0].device)
        for part in earlier:
            loss, of_part = self.loss(part, targets, len(part[0]) / size)
            value, measured = value + loss.detach(), measured + of_part
            with torch.autocast(self.device.type, enabled=False):
                torch.autograd.backward(loss)
        loss, of_part = self.loss(last, targets, len(last[0]) / size)
        self.measured = self._average(measured + of_part)
        if self.global_step % 50 == 0:
            self.log("nll", self.measured[0], prog_bar=True)
            self.log("mean |x1|", self.measured[1], prog_bar=True)
            self.log("sparsity", self.measured[2:].mean(), prog_bar=True)
        total = self._average(value + loss.detach())
        return loss + (total - loss).detach()  # the value of all parts, the gradient of the last

    def loss(self, part: Sequence[Tensor], targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Return a part's share of the loss of a step, and of `measured`, without gradient.

        Args:
            part: Ids, and labels if not every token has a loss.
            targets: () tokens of the whole step that have one, the mean over processes.
            share: The part's share of the sequences of this process.
        """
        nll, l1_L, zeros_L, about_gates = self._measured(*part)
        nll, l1 = nll / targets, share * l1_L.sum()
        self.l1_weight = self.phase.l1_at(self.global_step)
        loss = nll + self.l1_weight * l1
        if about_gates is not None:
            below, gates_K = about_gates
            self._gates.append(gates_K)
            loss = loss + BELOW_WEIGHT * share * below
        return loss, torch.cat([torch.stack([nll, l1]), share * zeros_L]).detach()

    @torch.no_grad()
    def mean_nll(self, ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Compute the mean NLL of the labels that are not -100, the same on all processes."""
        run = self._measured if self._sharded else self._forward
        return run(ids_BS, labels_BS)[0] / (labels_BS[:, 1:] != IGNORED).sum()

    def _average(self, values: Tensor) -> Tensor:
        """Return the mean of measured values over the processes."""
        return values

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Move the threshold, which the backward pass has read."""
        if self.raised is not None:
            zeros = self.measured[2:].mean()
            self.raised.move(self.global_step, torch.cat(self._gates), zeros)

    def optimizer_zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Keep the gradients of a step's first forward passes."""

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
        self._restore(optimizer)
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

    def _restore(self, optimizer: Optimizer) -> None:
        """Go on with the optimizer's state of the phase before."""
        if self._optimizer_state is not None:
            # AdamW updates its state in place, and the next branch starts from the same state.
            optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))

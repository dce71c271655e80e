"""Training batches from a running model, without storing activations of the training text.

Each epoch reads the next documents, so a token trains once unless the corpus is too short and is
read again. Tokens of many documents are pooled and shuffled, `POOL` batches at a time. The warm
start computes its moments in a separate pass over the first `WARM_TOKENS`. Calibration reads its
documents several times, so they are recorded to a store in the unfinished run's folder, which is
removed at the end; `collect` loads the model for that before it is loaded again for training.

Memory: the model; on the device, at 2 D + F / 8 bytes per token and layer, and F more where misses
are weighted by value, twice `POOL` batches and one forward pass of `DOCUMENTS` documents; before
training, (D, D) and (F, D) moments of every layer in float32.

Shape letters: L layers, N places of a batch, T tokens, D hidden, F FFN width, P packed width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.config import CollectConfig
from sparsecast.collect.run import collect
from sparsecast.collect.store.energy import Gains, encode_all
from sparsecast.collect.store.filler import gains_of
from sparsecast.collect.store.shard import INPUT_DTYPES
from sparsecast.collect.store.store import ActivationStore
from sparsecast.core.bitmask import pack, unpack
from sparsecast.core.errors import InputError
from sparsecast.core.interrupts import interrupt_like
from sparsecast.core.messages import log
from sparsecast.core.models.loading import embedding_rows, input_device, load_model
from sparsecast.core.models.recorder import Recorder
from sparsecast.core.options import ModelDtype
from sparsecast.core.progress import progress_bar
from sparsecast.core.text.corpus import LongDocuments, read_documents
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.splits import assign_splits
from sparsecast.core.text.tokens import TokenBatch, batch_by_length, tokenize_documents
from sparsecast.predictors.training.data import LayersBatch
from sparsecast.predictors.training.plan import TrainingPlan, work_folder
from sparsecast.predictors.training.warm_start import Moments, MomentSums

POOL = 16
"""Batches that are pooled and shuffled together."""
CALIBRATION_TOKENS = 20_000
"""Tokens that calibration records, or a tenth of the training tokens if that is less."""
WARM_TOKENS = 65_536
"""Tokens of the warm start, or 16 times the hidden size if that is more."""
DOCUMENTS = 8
"""Documents of full length per forward pass."""
STORE = "calibration"
"""Folder of the recorded calibration documents."""


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """The model that runs during training, and the text that it reads."""

    model: str
    corpus: str
    tokens: int
    """Training tokens."""
    seq_len: int
    """Tokens that the model reads at once."""
    long_documents: LongDocuments
    """What becomes of longer documents."""
    dtype: ModelDtype
    device: str
    activation_threshold: float | None
    out: Path
    """Folder for the predictors."""


class OnlineSource:
    """The training split of a corpus, read by a model."""

    def __init__(
        self,
        store: ActivationStore,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        training_text: TrainingText,
    ) -> None:
        self.store = store
        self._model = model
        self._tokenizer = tokenizer
        self._training_text = training_text
        self._told = False
        self._skipped = SkippedRows(training_text.corpus)
        self._x_dtype = INPUT_DTYPES[store.manifest.x_dtype]

    @cached_property
    def _gains(self) -> dict[int, Gains]:
        return gains_of(self._model, self.store.manifest.layers)

    def batches(self, plan: TrainingPlan) -> ModelBatches:
        return ModelBatches(self, plan)

    def moments(self, layers: Sequence[int], device: torch.device) -> Iterator[Moments]:
        shape = self.store.manifest.model_shape
        sums = [MomentSums(shape.hidden_size, shape.ffn_width, device) for _ in layers]
        wanted = warm_tokens(self._training_text, shape.hidden_size)
        done = 0
        with progress_bar("moments", wanted) as progress:
            for text in self.text():
                x_LTD, mask_LTP, _ = self.forward(text, layers)
                for total, x_TD, mask_TP in zip(sums, x_LTD, mask_LTP, strict=True):
                    total.add(x_TD.to(device), unpack(mask_TP, shape.ffn_width).to(device))
                progress.advance(text.tokens)
                done += text.tokens
                if done >= wanted:
                    break
        while sums:
            yield sums.pop(0).mean()

    def text(self) -> Iterator[TokenBatch]:
        """Yield batches of training documents without end."""
        corpus, seq_len = self.store.manifest.corpus, self._training_text.seq_len
        long_documents = self._training_text.long_documents
        while True:
            read, skipped = 0, SkippedRows(corpus)
            docs = read_documents(
                corpus, seq_len=seq_len, long_documents=long_documents, skipped=skipped
            )
            rows = tokenize_documents(
                assign_splits(docs),
                self._tokenizer,
                {"train": 1 << 62},
                seq_len,
                vocabulary=embedding_rows(self._model),
                long_documents=long_documents,
                skipped=skipped,
            )
            for batch in batch_by_length(rows, seq_len=seq_len, batch_size=DOCUMENTS):
                read += batch.tokens
                if skipped.count >= self._skipped.count:  # other passes may end earlier
                    self._skipped = skipped
                yield batch
            if not read:
                raise InputError(f"{corpus}: no training document; give more text")
            if not self._told:
                self._told = True
                log.warning(
                    f"{corpus}: has {read:,} training tokens, fewer than --tokens "
                    f"{self._training_text.tokens:,}, so it is read again"
                )

    def tell_skipped(self) -> None:
        self._skipped.tell()

    def forward(
        self, text: TokenBatch, layers: Sequence[int], *, values: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the model on a batch of documents.

        Returns:
            Inputs (L, T, D) in the store's dtype, packed masks (L, T, P) and, with `values`, codes
            of amplitudes (L, T, F), on the device.

        Raises:
            InputError: An input is not finite in the store's dtype.
        """
        inputs, masks, codes = [], [], []
        kept_N = text.keep_BS.flatten().to(input_device(self._model))

        def sink(layer: int, x_ND: Tensor, x1_NF: Tensor) -> None:
            x1_TF = x1_NF[kept_N]
            inputs.append(x_ND[kept_N].to(self._x_dtype))
            masks.append(pack(x1_TF != 0))
            if values:
                codes.append(encode_all(x1_TF, self._gains[layer]))

        with torch.no_grad(), Recorder(self._model, sink, list(layers)):
            self._model.base_model(text.ids_BS.to(kept_N.device), use_cache=False)
        x_LTD = torch.stack(inputs)
        if not x_LTD.isfinite().all():
            raise InputError(
                f"a predictor input does not fit {self.store.manifest.x_dtype}; train with --dtype "
                "bfloat16, or check the model's weights"
            )
        return x_LTD, torch.stack(masks), torch.stack(codes) if values else None


class ModelBatches(torch.utils.data.IterableDataset[LayersBatch]):
    """`plan.steps_per_epoch` batches per epoch, from the documents after the previous epoch's."""

    def __init__(self, source: OnlineSource, plan: TrainingPlan) -> None:
        assert plan.steps_per_epoch is not None
        self._source = source
        self._steps_per_epoch = plan.steps_per_epoch
        self._batch_tokens = plan.schedule.batch_tokens
        self._seed = plan.schedule.seed
        self._layers = plan.own_layers
        self._values = plan.loss == "value"
        self._share = plan.batch_share
        self._text: Iterator[TokenBatch] = iter(())
        self._next: int | None = None
        self.epoch = 0

    def __len__(self) -> int:
        return self._steps_per_epoch

    def __iter__(self) -> Iterator[LayersBatch]:
        if self._next != self.epoch:
            self._rewind()
        self._next = None
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        pooled: list[tuple[Tensor, Tensor, Tensor | None]] = []
        left = self._steps_per_epoch
        while left:
            held = sum(mask_LTP.shape[1] for _, mask_LTP, _ in pooled)
            if held < min(POOL, left) * self._batch_tokens:
                text = next(self._text)
                pooled.append(self._source.forward(text, self._layers, values=self._values))
                continue
            xs, masks, values = zip(*pooled, strict=True)
            x_LTD, mask_LTP = torch.cat(xs, dim=1), torch.cat(masks, dim=1)
            value_LTF = torch.cat(values, dim=1) if self._values else None
            pooled.clear()
            order = torch.randperm(held, generator=generator).to(mask_LTP.device)
            steps = min(left, held // self._batch_tokens)
            for step in range(steps):
                rows = order[step * self._batch_tokens : (step + 1) * self._batch_tokens]
                left -= 1
                if not left:  # the consumer may stop here, before the loop ends
                    self._next = self.epoch + 1
                yield LayersBatch(
                    x_LTD[:, rows], mask_LTP[:, rows], value_LBF=_rows(value_LTF, rows)
                )
            rest = order[steps * self._batch_tokens :]
            pooled.append((x_LTD[:, rest], mask_LTP[:, rest], _rows(value_LTF, rest)))

    def _rewind(self) -> None:
        """Restart the text and skip what earlier epochs read."""
        place, of = self._share
        self._text = (text for i, text in enumerate(self._source.text()) if i % of == place)
        for _ in range(self.epoch):
            held = 0
            while held < self._steps_per_epoch * self._batch_tokens:
                held += next(self._text).tokens


def _rows(value_LTF: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if value_LTF is None else value_LTF[:, rows]


def calibration_recording(text: TrainingText) -> tuple[CollectConfig, dict[str, int]]:
    """Return how the calibration documents are recorded: options, and tokens per split."""
    calibration = max(60, min(CALIBRATION_TOKENS, text.tokens // 10))
    collection = CollectConfig(
        model=text.model,
        corpus=text.corpus,
        out=work_folder(text.out) / STORE,
        tokens=calibration,
        seq_len=text.seq_len,
        long_documents=text.long_documents,
        device=text.device,
        dtype=text.dtype,
        activation_threshold=text.activation_threshold,
    )
    return collection, {"train": 2, "calibration": calibration, "held-out": 2}


def warm_tokens(text: TrainingText, hidden_size: int) -> int:
    """Return the tokens of the warm start."""
    return min(text.tokens, max(WARM_TOKENS, 16 * hidden_size))


def open_online_source(text: TrainingText) -> OnlineSource:
    """Record the calibration documents and load the model.

    Raises:
        InputError: See `collect`.
        KeyboardInterrupt: At Ctrl-C.
    """
    collection, shares = calibration_recording(text)
    try:
        store = collect(collection, shares)
    except KeyboardInterrupt as error:
        told = f"{text.out}: interrupted before training began, nothing is left behind"
        raise interrupt_like(error, told) from None
    model, tokenizer = load_model(
        text.model,
        device=text.device,
        dtype=text.dtype,
        activation_threshold=text.activation_threshold,
    )
    log.info(f"training on {text.tokens:,} tokens of {text.corpus}, none of them stored")
    return OnlineSource(store, model, tokenizer, text)

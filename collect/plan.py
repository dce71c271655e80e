"""The plan of one collection: every option resolved, model and tokenizer loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from sparsecast.collect.output import partial_folder
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.store import Manifest, read_manifest
from sparsecast.collect.store.units import Tally, Unit, units
from sparsecast.core.distributed import DistributedContext
from sparsecast.core.interrupts import StopFlag
from sparsecast.core.models.loading import embedding_rows
from sparsecast.core.run_record import Run
from sparsecast.core.text.corpus import Document, LongDocuments
from sparsecast.core.text.skipped import SkippedRows
from sparsecast.core.text.tokens import tokenize_documents


@dataclass(frozen=True, kw_only=True)
class CollectionPlan:
    """What to record, with which model, and where to write it."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    documents: Iterator[tuple[str, Document]]
    """(split, document) pairs in corpus order; can be read once."""
    quotas: Mapping[str, int]
    """Tokens to record per split."""
    seq_len: int
    long_documents: LongDocuments
    skipped: SkippedRows
    """Counts the rows of the corpus that cannot be used."""
    batch_size: int
    largest_shard: int
    """Tokens of the largest shard that may occur."""
    manifest: Manifest
    """The store's manifest, without counts."""
    out: Path
    """The finished folder."""
    store_bytes: int
    """Estimated size of the finished folder."""
    run: Run
    """What run.json says of the collection."""
    ranks: DistributedContext

    @property
    def shape(self) -> Shape:
        return self.manifest.shape

    @property
    def partial(self) -> Path:
        """The hidden folder that grows until it is complete."""
        return partial_folder(self.out)

    def with_first_threads(self) -> CollectionPlan:
        """The plan with the number of CPU threads that began the folder: rounding depends on it."""
        threads = read_manifest(self.partial).threads
        return replace(self, manifest=replace(self.manifest, threads=threads))

    def units(self, tally: Tally, stop: StopFlag) -> Iterator[Unit]:
        """The units of all ranks in order, until `stop`; `tally` counts their documents."""
        rows = tokenize_documents(
            stop.until(self.documents),
            self.tokenizer,
            self.quotas,
            self.seq_len,
            vocabulary=embedding_rows(self.model),
            long_documents=self.long_documents,
            skipped=self.skipped,
        )
        return units(
            tally.over(rows),
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            shard_tokens=self.shape.shard_tokens,
        )

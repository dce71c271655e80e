"""Carry out a `CollectionPlan`: record this rank's shards, then complete the store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, islice

import torch
from transformers import PreTrainedModel

from sparsecast.collect.first_batch import warn_of_activation
from sparsecast.collect.output import finished_shards
from sparsecast.collect.plan import CollectionPlan
from sparsecast.collect.store.expert_filler import ExpertFiller
from sparsecast.collect.store.filler import Filler, x1_gains
from sparsecast.collect.store.firing import NothingFiresError, check_firing
from sparsecast.collect.store.shard import Shape
from sparsecast.collect.store.shard_reader import ShardFile
from sparsecast.collect.store.store import ActivationStore, Manifest, seal
from sparsecast.collect.store.units import ShardInfo, Tally, Unit
from sparsecast.collect.store.writer import Writer, record_unit, to_folder
from sparsecast.core.disk import full_disk_errno, full_disk_error
from sparsecast.core.errors import InputError
from sparsecast.core.interrupts import StopFlag, interrupt_like
from sparsecast.core.messages import log
from sparsecast.core.models.expert_recorder import ExpertRecorder
from sparsecast.core.models.loading import input_device
from sparsecast.core.models.recorder import Recorder
from sparsecast.core.prefetch import prefetch
from sparsecast.core.progress import Bar, progress_bar
from sparsecast.core.text.splits import SPLITS
from sparsecast.core.text.tokens import TokenBatch


def record(plan: CollectionPlan, stop: StopFlag) -> tuple[list[ShardInfo], Tally]:
    """Write this rank's share of the shards; returns all shards, and the documents in them."""
    model, shape, ranks, tally = plan.model, plan.shape, plan.ranks, Tally()
    on_gpu = any(weight.is_cuda for weight in model.parameters())
    filler, recorder = recorder_of(model, shape)
    capacity = shape.nbytes(plan.largest_shard)
    shards = []
    units = prefetch(plan.units(tally, stop), waiting=stop.check)
    first = list(islice(units, 1))
    if first and ranks.leads and not finished_shards(plan.partial):
        warn_of_activation(plan, first[0], stop)
    with (
        _threads(plan.manifest.threads),
        Writer(shape, capacity, to_folder(plan.partial), pinned=on_gpu) as writer,
        progress_bar("collect", sum(plan.quotas.values()), visible=ranks.leads) as progress,
        torch.inference_mode(),
        recorder,
    ):
        forward = partial(_forward, model, stop, progress)
        for number, unit in enumerate(chain(first, units)):
            shards.append(unit.info)
            stop.check()
            if number % ranks.size != ranks.rank or _is_recorded(unit, plan):
                progress.advance(unit.tokens)
            else:
                record_unit(filler, writer, unit, forward)
        stop.check()
    return shards, tally


def recorder_of(
    model: PreTrainedModel, shape: Shape
) -> tuple[Filler, AbstractContextManager[object]]:
    """Return what fills shards, and what shows it every layer while it is entered."""
    if shape.experts:
        experts = ExpertFiller(shape)
        return experts, ExpertRecorder(model, experts.record, experts.layers)
    filler = Filler(shape, x1_gains(model, shape))
    return filler, Recorder(model, filler, filler.layers)


def _forward(model: PreTrainedModel, stop: StopFlag, progress: Bar, batch: TokenBatch) -> None:
    stop.check()
    # Right padding: causal attention needs no mask to keep it out of real tokens.
    model.base_model(batch.to(input_device(model)).ids_BS, use_cache=False)
    progress.advance(batch.tokens)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Set the number of CPU threads for a block: sums split in other ways round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _is_recorded(unit: Unit, plan: CollectionPlan) -> bool:
    """Return whether an earlier run wrote this shard, intact and of the same tokens."""
    path = plan.partial / unit.info.name
    if not path.is_file():
        return False
    try:
        tensors = ShardFile(path)
        tensors.check()
        tokens = len(tensors.get("id", ()))
        if what := plan.shape.misfit(tensors.header.fields, tokens, stored=unit.stored):
            raise InputError(f"{path}: damaged header, {what}")
    except InputError as error:
        log.warning(f"{error}; recorded again")
        return False
    if not torch.equal(tensors["id"], unit.ids()):
        raise InputError(
            f"{path}: holds other tokens than {plan.manifest.corpus} has there now; the corpus has "
            f"changed since the collection began: restore it, or remove {path.parent} to begin "
            "again"
        )
    return True


def complete(plan: CollectionPlan, shards: list[ShardInfo], tally: Tally) -> Manifest:
    """Write statistics and the complete manifest, and give the folder its name.

    Raises:
        InputError: A split has no token, or nothing fires; the partial folder is removed then.
    """
    folder, manifest = plan.partial, plan.manifest
    if short := [name for name in SPLITS if not any(shard.split == name for shard in shards)]:
        shutil.rmtree(folder)
        raise InputError(
            f"{manifest.corpus}: no token for {' and '.join(short)}; give more text, in more files"
        )
    names = {shard.name for shard in shards}
    for leftover in finished_shards(folder):
        if leftover.name not in names:
            leftover.unlink()
    counted = replace(
        manifest,
        documents=tally.documents,
        truncated=tally.truncated,
        skipped=plan.skipped.count,
    )
    manifest = seal(folder, counted, shards)
    try:
        check_firing(ActivationStore(folder).stats(), manifest.ffns, manifest.model)
    except NothingFiresError:
        shutil.rmtree(folder)
        raise
    plan.run.write(folder, threads=manifest.threads)
    if plan.out.is_dir():
        plan.out.rmdir()
    os.replace(folder, plan.out)
    return manifest


@contextmanager
def keeping_shards(plan: CollectionPlan, stop: StopFlag) -> Iterator[None]:
    """If recording ends early, remove a useless partial folder and say what is kept."""
    fresh = not finished_shards(plan.partial)
    try:
        yield
    except BaseException as error:
        kept = len(finished_shards(plan.partial))
        if plan.ranks.leads and (not kept or (fresh and isinstance(error, NothingFiresError))):
            shutil.rmtree(plan.partial, ignore_errors=True)
        outcome = _with_outcome(error, plan, kept, stop)
        if outcome is error:
            raise
        raise outcome from None if isinstance(error, KeyboardInterrupt) else error


def _with_outcome(
    error: BaseException, plan: CollectionPlan, kept: int, stop: StopFlag
) -> BaseException:
    """Add what is kept to an interrupt or a disk error; return other errors unchanged."""
    left = (
        f"{kept} finished shards are kept, the same command goes on from there"
        if kept
        else "no shard was finished yet, nothing is left behind"
    )
    if full_disk_errno(error) is not None:
        return full_disk_error(error, plan.out, plan.store_bytes, "the store", left)
    if isinstance(error, OSError):
        return OSError(f"{error.filename or plan.out}: {error.strerror or error}; {left}")
    if not isinstance(error, KeyboardInterrupt):
        return error
    by_torchrun = stop.terminated and plan.ranks.size > 1
    how = (
        "stopped by SIGTERM, as torchrun does when a rank fails; that rank's own message says why"
        if by_torchrun
        else "interrupted"
    )
    return interrupt_like(error, f"{plan.out}: {how}; {left}")

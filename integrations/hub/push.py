"""The push stage: a finished folder to the Hub, with its card."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from rich.table import Table

from sparsecast.core.disk import format_bytes
from sparsecast.core.errors import InputError
from sparsecast.core.files import read_bytes
from sparsecast.core.hub import hub_name
from sparsecast.core.messages import log, show
from sparsecast.integrations.hub.card import CardInputs, build_card, dataset_id, metadata_of
from sparsecast.integrations.hub.config import PushConfig
from sparsecast.integrations.hub.contents import check_contents
from sparsecast.integrations.hub.facts import Facts
from sparsecast.integrations.hub.files import CARD, Selection, select
from sparsecast.integrations.hub.public import Publisher, check_public, last_part
from sparsecast.integrations.hub.scores import more_measures
from sparsecast.integrations.hub.upload import Hub


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be."""

    repo: str
    url: str | None
    """The commit's; None of a dry run."""
    card: str
    files: dict[str, int]
    """Sizes in bytes by name in the repository, README.md included."""


def push(cfg: PushConfig, api: HfApi | None = None) -> Pushed:
    """Check a folder, build its card and upload both in one commit.

    Args:
        api: Client of another Hub than HF_ENDPOINT's.

    Raises:
        InputError: A folder that is not whole, no token, or what the Hub refuses.
        ConnectionError: The Hub does not answer.
    """
    selection = select(cfg.folder, shards=cfg.shards)
    facts, predictors = check_contents(selection, shards=cfg.shards)
    facts.measures += more_measures(cfg, facts, predictors)
    hub = None if cfg.dry_run else Hub(_with_token(api))
    repo = cfg.repo if hub is None else hub.owner_of(cfg.repo)
    base = _base_model(cfg, facts, hub)
    datasets = _datasets(facts, hub)
    contents, card = _public(cfg, selection, facts, repo, base, datasets)
    contents = {CARD: card.encode(), **contents}
    sizes = {name: _size(content) for name, content in contents.items()}
    if hub is None:
        _show(selection, sizes, card)
        return Pushed(repo, None, card, sizes)
    hub.check_card(card)
    target = hub.open_target(
        repo,
        cfg.branch,
        selection.kind,
        set(contents),
        private=cfg.private,
        replace=cfg.replace,
    )
    url = hub.push(target, contents, f"Push {selection.kind} with sparsecast")
    log.info(f"{url}: {len(sizes)} files, {format_bytes(sum(sizes.values()))}")
    return Pushed(repo, url, card, sizes)


def _with_token(api: HfApi | None) -> HfApi:
    api = api or HfApi()
    if not (api.token or get_token()):
        raise InputError(
            "push: no access token of the Hub is here; run `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    return api


def _base_model(cfg: PushConfig, facts: Facts, hub: Hub | None) -> str | None:
    """Return the hub id of the model that the folder belongs to; None where there is none.

    Args:
        hub: Asked whether it has the model; None in a dry run, which believes the name.
    """
    if cfg.base_model is not None:
        if hub is not None and not hub.has(cfg.base_model, "model"):
            raise InputError(
                f"--base-model: the Hub has no model {cfg.base_model} that you can see; check the "
                "spelling"
            )
        return cfg.base_model
    if facts.model is None:
        return None
    name = hub_name(facts.model)
    if name is not None and (hub is None or hub.has(name.repo, "model")):
        return name.repo
    log.warning(
        f"{cfg.folder}: belongs to {facts.model}, which is no model on the Hub, so the card has no "
        "base_model; if it is there under another name, give --base-model"
    )
    return None


def _texts(facts: Facts) -> list[str]:
    return [*facts.corpora, *(measure.corpus for measure in facts.measures)]


def _datasets(facts: Facts, hub: Hub | None) -> list[str]:
    """Return the hub ids of the texts behind a folder and its scores that the Hub has."""
    names = dict.fromkeys(map(dataset_id, _texts(facts)))
    return [name for name in names if name and (hub is None or hub.has(name, "dataset"))]


def _public(
    cfg: PushConfig,
    selection: Selection,
    facts: Facts,
    repo: str,
    base: str | None,
    datasets: list[str],
) -> tuple[dict[str, bytes | Path], str]:
    """Return the files but README.md, and the card, without this machine's paths."""
    # What looks like a hub id but is none is a path of the machine where it was recorded.
    names = {name: last_part(name) for name in _texts(facts) if dataset_id(name) not in datasets}
    if facts.model is not None and facts.model.partition("@")[0] != base:
        names[facts.model] = base or last_part(facts.model)
    publisher = Publisher(selection, names)
    contents = publisher.contents()
    facts.model = publisher.public(facts.model)
    facts.corpora = publisher.public(facts.corpora)
    facts.measures = [
        measure._replace(corpus=publisher.public(measure.corpus)) for measure in facts.measures
    ]
    readme = selection.files.get(CARD)
    inputs = CardInputs(
        facts,
        repo,
        base_model=base,
        datasets=datasets,
        license=cfg.license,
        text=None if readme is None else publisher.text(_text(readme)),
        explicit=[
            *(["license"] if cfg.license else []),
            *(["base_model", "base_model_relation"] if cfg.base_model else []),
        ],
        loads_in_transformers=selection.kind == "model" and facts.activation == "relu",
    )
    card = build_card(inputs, cfg.folder / CARD)
    if not metadata_of(card.data).get("license"):
        log.warning(
            f"{cfg.folder}: the card names no license, so nobody knows what they may do with it; "
            "give --license"
        )
    text = str(card)
    check_public(CARD, text.encode(), selection.folder)
    return contents, text


def _text(path: Path) -> str:
    try:
        return read_bytes(path, "the folder's card").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is no UTF-8 text ({error.reason}); save it as UTF-8") from error


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _show(selection: Selection, sizes: dict[str, int], card: str) -> None:
    """Show what a push would upload."""
    total = format_bytes(sum(sizes.values()))
    table = Table(title=f"{len(sizes)} files, {total}", title_justify="left")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in sorted(sizes.items()):
        table.add_row(name, f"{size:,}")
    show(table)
    if selection.left:
        some = ", ".join(selection.left[:10])
        more = f" and {len(selection.left) - 10} more" if len(selection.left) > 10 else ""
        log.info(f"stays here: {some}{more}")
    log.info(card)

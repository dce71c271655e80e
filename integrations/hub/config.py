"""The options of `sparsecast push`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.options import short_repr, validate_fields


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Upload activations' statistics, predictors, a bundle or a sparse model to the Hugging Face
    Hub, with a model card.

    Only a whole, intact folder is pushed, and of it only the files that its kind consists of. No
    path of this machine goes with them.
    """

    folder: Path
    """Folder written by `sparsecast collect`, `train`, `export`, `convert` or `sparsify`."""

    repo: str
    """Repository to push to, as owner/name, or name alone for your own; made if there is none."""

    branch: str = "main"
    """Branch to push to; made if there is none."""

    private: bool = False
    """Make a new repository private; one that exists must be private then."""

    license: str | None = None
    """License of what is pushed, as the Hub spells it: apache-2.0, mit, llama2, other, ..."""

    base_model: str | None = None
    """Hub id of the model that it belongs to; needed where the folder names a local path."""

    report: Path | None = None
    """report.json of `sparsecast report` on these predictors, or its folder; adds held-out scores
    to the card. A report.json in the folder counts too."""

    evaluation: Path | None = None
    """JSON written by `sparsecast evaluate --json`; adds the change in perplexity to the card. An
    evaluate.json in the folder counts too."""

    shards: bool = False
    """Of activations push the recorded tokens too, not only manifest and statistics. They hold the
    ids of the text's tokens."""

    replace: bool = False
    """Delete files of an earlier push that the folder no longer has, in the same commit."""

    dry_run: bool = False
    """List the files with their sizes and show the card; nothing goes to the network."""

    def __post_init__(self) -> None:
        validate_fields(self)
        _check_name("--repo", self.repo)
        if self.base_model is not None:
            _check_name("--base-model", self.base_model, owner=True)
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise InputError(
                f"--license: got {short_repr(self.license)}, expected a license as the Hub spells "
                "it, such as apache-2.0, mit, llama2 or other"
            )
        if not re.fullmatch(r"(?!refs/)[A-Za-z0-9_][\w./-]*", self.branch) or ".." in self.branch:
            raise InputError(
                f"--branch: got {short_repr(self.branch)}, expected the name of a branch such as "
                "main"
            )


def _check_name(option: str, name: str, *, owner: bool = False) -> None:
    """Refuse what is no name on the Hub, or has no owner where one is needed."""
    try:
        validate_repo_id(name)
        why = "" if "/" in name or not owner else "it has no owner"
    except HFValidationError as error:
        why = reason_of(error)
    if why:
        raise InputError(f"{option}: got {short_repr(name)}, expected owner/name ({why})")

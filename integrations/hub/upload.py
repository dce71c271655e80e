"""Push files in one commit: whole or not at all, and going on where an earlier try ended.

Large files are uploaded one after the other before the commit names them. The Hub keeps what it
has got, so that a second try sends only the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    hf_raise_for_status,
)

from sparsecast.core.disk import format_bytes
from sparsecast.core.errors import InputError, reason_of
from sparsecast.core.hub import HUB_SECONDS, kind_of
from sparsecast.core.progress import console, progress_bar
from sparsecast.integrations.hub.files import LEGAL, belongs

GROUP = 64 << 20
"""Bytes of small files that are uploaded together."""
_CLIENTS = ("httpx", "httpx2", "requests", "urllib3", "hf_xet")
"""HTTP libraries of huggingface_hub's versions, whose errors are no `OSError` all."""
_LOGIN = "run `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Target:
    """The repository and branch to push to."""

    repo: str
    """owner/name."""
    branch: str
    head: str | None
    """Its newest commit; another one meanwhile makes the push fail."""
    stale: list[str]
    """Files of an earlier push to delete."""


class Hub:
    """The Hub, with errors in one line."""

    def __init__(self, api: HfApi | None = None) -> None:
        self.api = api or HfApi()

    def owner_of(self, repo: str) -> str:
        """Complete a repository's name with the user's own, and check the token.

        Raises:
            InputError: No token, or one that the Hub does not know.
        """
        with explained("the token"):
            name = str(self.api.whoami()["name"])
        return repo if "/" in repo else f"{name}/{repo}"

    def has(self, name: str, kind: str) -> bool:
        """Return whether a model or a dataset of this name is on the Hub, for this user."""
        with explained(name):
            try:
                self.api.repo_info(name, repo_type=kind, timeout=HUB_SECONDS)
            except (RepositoryNotFoundError, HFValidationError):
                return False
        return True

    def check_card(self, card: str) -> None:
        """Let the Hub check the metadata before anything is made.

        The client's own `ModelCard.validate` asks HF_ENDPOINT's Hub, or in older versions always
        huggingface.co.

        Raises:
            InputError: What the Hub refuses, such as a license that it does not know.
        """
        with explained("the card"):
            answer = get_session().post(
                f"{self.api.endpoint}/api/validate-yaml",
                json={"content": card, "repoType": "model"},
            )
            if answer.status_code == 400:
                wrong = [str(row.get("message")) for row in answer.json().get("errors", [])]
                raise InputError(
                    f"the Hub refuses the card's metadata: {' '.join('; '.join(wrong).split())}; "
                    "correct --license, --base-model or the metadata in the folder's README.md"
                )
            hf_raise_for_status(answer)

    def open_target(
        self, repo: str, branch: str, kind: str, names: set[str], *, private: bool, replace: bool
    ) -> Target:
        """Make the repository and the branch if they are missing, and look at what they hold.

        Args:
            kind: Kind of the folder to push, and `names` its files.
            private: Refuse a repository that everybody can read.
            replace: Whether stale files may be deleted.

        Raises:
            InputError: The repository holds another kind of folder, stale files, or is public.
        """
        with explained(repo):
            # An existing one keeps its visibility.
            self.api.create_repo(repo, private=True if private else None, exist_ok=True)
            info = self.api.model_info(repo, timeout=HUB_SECONDS)
            if private and info.private is False:
                raise InputError(
                    f"{repo}: exists and everybody can read it, expected a private repository; "
                    "change that in its settings, or choose another --repo"
                )
            if branch != "main":
                self.api.create_branch(repo, branch=branch, exist_ok=True)
                info = self.api.model_info(repo, revision=branch, timeout=HUB_SECONDS)
        there = [file.rfilename for file in info.siblings or []]
        stale = find_stale(repo, there, kind, names)
        if stale and not replace:
            raise InputError(
                f"{repo}: holds {_some(stale)} of an earlier push, which the folder does not have "
                "and which would be read with it; delete them with --replace true, or choose "
                "another --repo"
            )
        return Target(repo, branch, info.sha, stale)

    def push(self, target: Target, files: Mapping[str, bytes | Path], message: str) -> str:
        """Upload the files, commit them, and return the commit's URL.

        Raises:
            InputError: The Hub refuses them.
            ConnectionError: The Hub does not answer.
        """
        additions = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in files.items()
        ]
        total = sum(addition.upload_info.size for addition in additions)
        with explained(target.repo), _bars(total) as advance:
            for group in _groups(additions):
                self.api.preupload_lfs_files(target.repo, additions=group, revision=target.branch)
                advance(sum(addition.upload_info.size for addition in group))
            commit = self.api.create_commit(
                target.repo,
                operations=[
                    *additions,
                    *(CommitOperationDelete(path_in_repo=name) for name in target.stale),
                ],
                commit_message=message,
                revision=target.branch,
                parent_commit=target.head,
            )
            self._check(target, additions)
        return str(commit.commit_url)

    def _check(self, target: Target, additions: list[CommitOperationAdd]) -> None:
        """Compare what the Hub now holds with what was sent: a .gitignore there drops files."""
        info = self.api.model_info(target.repo, revision=target.branch, files_metadata=True)
        there = {file.rfilename: file.size for file in info.siblings or []}
        lost = [
            addition.path_in_repo
            for addition in additions
            if there.get(addition.path_in_repo) != addition.upload_info.size
        ]
        if lost:
            raise InputError(
                f"{target.repo}: {_some(lost)} did not arrive; is there a .gitignore in the "
                "repository? Remove it there and push again"
            )


def find_stale(repo: str, there: list[str], kind: str, names: set[str]) -> list[str]:
    """Return the files of a repository that an earlier push of this kind has left.

    Raises:
        InputError: It holds another kind of folder, whose files would be overwritten.
    """
    found = kind_of(there) or ("model" if "config.json" in there else None)
    if found not in (None, kind):
        raise InputError(
            f"{repo}: holds {'a ' * (found in ('model', 'bundle'))}{found}, and this folder is "
            f"{'a ' * (kind in ('model', 'bundle'))}{kind}; choose another --repo"
        )
    legal = [name for name in there if "/" not in name and belongs(name, kind)]
    kept = {name for name in legal if any(name.startswith(mark.rstrip("*")) for mark in LEGAL)}
    return sorted(name for name in there if belongs(name, kind) and name not in names | kept)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one line.

    Raises:
        InputError: The Hub answered with a refusal.
        ConnectionError: It did not answer.
    """
    try:
        yield
    except InputError:
        raise
    except OfflineModeIsEnabled as error:
        raise InputError(
            f"{what}: HF_HUB_OFFLINE is set, and pushing needs the network; unset it, or see what "
            "would be pushed with --dry-run true"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(what, error) from error
    except ValueError as error:
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, HfHubHTTPError):
            raise _refusal(what, cause) from error
        client = type(error).__module__.partition(".")[0] in _CLIENTS
        if not client and not isinstance(error, (OSError, RuntimeError)):
            raise
        raise ConnectionError(
            f"{what}: the Hub does not answer ({reason_of(cause)}); what has arrived there is "
            "kept, run the same command again"
        ) from error


def _refusal(what: str, error: HfHubHTTPError) -> Exception:
    """Return what to raise for an HTTP status."""
    status = 0 if error.response is None else error.response.status_code
    told = reason_of(error)
    if status >= 500 or status in (0, 408, 429):
        return ConnectionError(
            f"{what}: the Hub cannot do that now ({told}); what has arrived there is kept, run the "
            "same command again later"
        )
    if status == 401 and what == "the token":
        return InputError(f"{what}: the Hub does not know it ({told}); {_LOGIN}")
    if status in (401, 403):
        return InputError(f"{what}: this token may not do that ({told}); {_LOGIN}")
    if status == 412:
        return InputError(f"{what}: somebody pushed to it meanwhile; run the same command again")
    if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        return InputError(f"{what}: no such repository or branch ({told}); check the spelling")
    return InputError(f"{what}: the Hub refuses that ({told})")


def _groups(additions: list[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Yield large files alone and small ones together, so that progress is seen."""
    group: list[CommitOperationAdd] = []
    for addition in additions:
        if group and sum(one.upload_info.size for one in (*group, addition)) > GROUP:
            yield group
            group = []
        group.append(addition)
    if group:
        yield group


@contextmanager
def _bars(total: int) -> Iterator[Any]:
    """Show progress: on a terminal the client's own bars, which see into files, else a log line."""
    off = are_progress_bars_disabled()
    if console.is_terminal:
        enable_progress_bars()
        try:
            yield lambda _: None
        finally:
            if off:
                disable_progress_bars()
        return
    disable_progress_bars()
    try:
        with progress_bar(f"push {format_bytes(total)}", total) as progress:
            yield progress.advance
    finally:
        if not off:
            enable_progress_bars()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

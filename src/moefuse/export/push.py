"""Push: a written checkpoint goes to the hub, after a look at what exactly would go.

Everything that can be checked without the hub is checked first, in a dry run too: that the
checkpoint is whole and has a card, and that nothing else lies in the directory that nobody means to
publish (work directories, training states, pickles, hidden files, links that lead out of it).
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from moefuse.checkpoint.headers import (
    CARD,
    INDEX,
    contained_path,
    list_shards,
    local_headers,
)
from moefuse.errors import UserError
from moefuse.export.original import front_matter

MESSAGE = "Upload a checkpoint made by moefuse"
SMALL = 64_000_000
"""Bytes; nothing but weights is larger in a checkpoint (the largest tokenizers have 35 MB)."""
KNOWN_SUFFIXES = {
    *(".json", ".md", ".txt", ".jinja", ".py", ".png", ".svg", ".pdf"),
    *(".model", ".tiktoken"),
}
KNOWN_NAMES = {".gitattributes", "LICENSE", "LICENCE", "NOTICE", "USE_POLICY"}
UNFINISHED = (".work", ".partial")
OLDER_WEIGHTS = ["*.safetensors", INDEX]
"""What of an older checkpoint in the same repository must not stay beside a newer one's weights."""


@dataclass(frozen=True)
class Upload:
    """What is to go where: ``files`` are bytes by the path within ``directory``."""

    directory: Path
    repo: str
    files: dict[str, int]
    private: bool
    revision: str | None
    message: str
    notes: list[str]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())


def prepare(
    directory: Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Upload:
    """Check a checkpoint and list what would be uploaded, without a word to the hub.

    Raises ``UserError`` for what is no whole checkpoint with a card, for files that have no place
    in one, and for what cannot be a repository's name.
    """
    _check_repo(repo)
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; give that of a written checkpoint.")
    local_headers(str(directory), directory)
    if not (directory / CARD).is_file():
        raise UserError(
            f"{directory} has no {CARD}; a model without a card helps nobody, so write one first."
        )
    files = _files(directory)
    return Upload(
        directory, repo, files, private, revision, message or MESSAGE, _notes(directory / CARD)
    )


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(
            f"{repo!r} cannot be the name of a repository on the hub; give one such as "
            "organisation/model, of letters, digits, '-', '_' and '.'."
        ) from error


def _files(directory: Path) -> dict[str, int]:
    """Return every file's bytes; raises ``UserError`` for one that has no place in a checkpoint."""
    shards, found = set(list_shards(directory)), {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        contained_path(directory, name)
        if path.is_dir():
            continue
        if name not in shards:
            _check_known(directory, path)
        found[name] = path.stat().st_size
    return found


def _check_known(directory: Path, path: Path) -> None:
    inner = path.relative_to(directory)
    unfinished = any(part.endswith(UNFINISHED) for part in inner.parts)
    hidden = any(part.startswith(".") for part in inner.parts) and path.name not in KNOWN_NAMES
    known = path.suffix in KNOWN_SUFFIXES or path.name.split("-")[0] in KNOWN_NAMES
    if unfinished or hidden or not known:
        what = "a hidden file" if hidden else "an unfinished one" if unfinished else "of a kind"
        suffix = "" if hidden or unfinished else " that no checkpoint has"
        raise UserError(
            f"{path} has no place in a checkpoint ({what}{suffix}), so nothing is uploaded; move "
            "it out of the directory."
        )
    if path.stat().st_size > SMALL:
        raise UserError(
            f"{path} has {path.stat().st_size / 1e6:.0f} MB and is none of the checkpoint's "
            "weights, so nothing is uploaded; move it out of the directory."
        )


def _notes(card: Path) -> list[str]:
    """Return what the owner should know before publishing."""
    if "license" in front_matter(card):
        return []
    return [f"{CARD} names no licence; find out which one applies before you publish."]


def describe(upload: Upload) -> str:
    """Return what would be uploaded, a line a file, and the command that does it."""
    width = max(map(len, upload.files))
    lines = [f"  {name:<{width}}  {size:>15,}" for name, size in upload.files.items()]
    kind = "private, where it is new" if upload.private else "public, where it is new"
    branch = f", branch {upload.revision}" if upload.revision else ""
    return "\n".join(
        [
            f"{upload.directory} to the repository {upload.repo} ({kind}){branch}:",
            *lines,
            f"{len(upload.files)} files, {upload.total_bytes:,} bytes. Weights of an older "
            "checkpoint there would be removed.",
            *upload.notes,
            "Nothing was uploaded. To do so:",
            f"  {_command(upload)}",
        ]
    )


def _command(upload: Upload) -> str:
    words = ["moefuse", "push", str(upload.directory), upload.repo, "--no-dry-run"]
    words += ["--private"] if upload.private else []
    words += ["--revision", upload.revision] if upload.revision else []
    words += ["--message", upload.message] if upload.message != MESSAGE else []
    return shlex.join(words)


def push(upload: Upload) -> str:
    """Create the repository if need be, upload everything, and return the address.

    An interrupted upload is gone on with by the same call. Raises ``UserError`` without a token,
    where the hub refuses or fails, and where a private repository is wished for and a public one is
    there.
    """
    token = get_token()
    if token is None:
        raise UserError(
            "There is no token for the hub; log in with `hf auth login` or set HF_TOKEN to one "
            "that may write."
        )
    api = HfApi(token=token)
    with _explained(upload.repo):
        place = api.create_repo(upload.repo, private=upload.private or None, exist_ok=True)
        repo = place.repo_id
        if upload.private and not api.model_info(repo).private:
            raise UserError(
                f"{repo} exists already and is public, so nothing was uploaded; make it private on "
                "the hub, leave out --private, or choose another name."
            )
        # A pull request's reference is there already, and nobody can make one by name.
        if upload.revision is not None and not upload.revision.startswith("refs/"):
            api.create_branch(repo, branch=upload.revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=upload.directory,
            commit_message=upload.message,
            revision=upload.revision,
            delete_patterns=OLDER_WEIGHTS,
        )
    return str(place) + (f"/tree/{upload.revision}" if upload.revision else "")


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into one sentence."""
    try:
        yield
    except UserError:
        raise
    except HfHubHTTPError as error:
        raise UserError(_refused(repo, error)) from error
    except ValueError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"The upload to {repo} was refused ({reason}); mend that first.") from error
    except Exception as error:  # connections fail in as many ways as there are libraries below
        raise UserError(
            f"The hub could not be reached while uploading to {repo} ({type(error).__name__}); "
            f"check the connection{_offline()}, and the same command goes on."
        ) from error


def _offline() -> str:
    return " and HF_HUB_OFFLINE, which is set" if os.environ.get("HF_HUB_OFFLINE") else ""


def _refused(repo: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        why = "the token is not valid; log in anew with `hf auth login`"
    elif status == 403:
        why = f"the token may not write to {repo}; use one that may, or a name of your own"
    elif status == 404:
        why = f"there is no {repo}, or not that revision, or the token may not see it"
    elif status >= 500:
        why = "the hub itself failed; try the same command again later"
    else:
        reason = " ".join((error.server_message or str(error)).split()).rstrip(".")
        why = reason or "no reason given"
    return f"The hub refused the upload to {repo} (status {status}): {why}."

"""Push: what is checked and shown, what arrives, and how failures are told.

Uploads run as a user's would, in processes of their own, against a stand-in on loopback.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub import TOKEN, Hub, Repo, running_hub
from running import contents, write_jsonl, write_text

from moefuse.errors import UserError
from moefuse.export.push import describe, prepare
from moefuse.pipeline import fuse

Tiny = Callable[..., Path]
REPO = "somebody/small-moe"
CARD_TEXT = "---\nlicense: mit\n---\n# x\n"


@pytest.fixture
def checkpoint(tiny_checkpoint: Tiny) -> Path:
    directory = tiny_checkpoint()
    (directory / "README.md").write_text(CARD_TEXT)
    return directory


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub
        assert not hub.unknown


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def run(hub_url: str, *arguments: str | Path, token: str | None = TOKEN) -> Ended:
    """Run ``moefuse push`` against the hub at an address; it sees no token but ``token``."""
    told = {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": "/nonexistent",
        "HF_HUB_OFFLINE": "0",
        # The stand-in speaks plain HTTP; Xet's storage has a protocol of its own.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ended = subprocess.run(
        [sys.executable, "-c", "from moefuse.cli import main; main()", "push", *arguments],
        env={**kept, **told, **({"HF_TOKEN": token} if token else {})},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def last_line(ended: Ended) -> str:
    lines = ended.err.strip().splitlines()
    assert "Traceback" not in ended.err, ended.err
    return lines[-1]


# What is uploaded.


def test_a_fused_checkpoint_arrives_byte_for_byte(
    tiny_checkpoint: Tiny, hub: Hub, tmp_path: Path
) -> None:
    values = {
        **{"groups": 3, "rank": 2, "tokens": 512, "sequence_length": 64, "batch_size": 4},
        **{"steps": 5, "batch_tokens": 64, "data": str(write_text(tmp_path / "text.txt"))},
        **{"held_out": str(write_jsonl(tmp_path / "held.jsonl")), "max_shard": "30KB"},
    }
    out = tmp_path / "student"
    fuse(tiny_checkpoint(), out, values)

    ended = run(hub.url, out, REPO, "--no-dry-run", "--message", "The first")

    assert ended.status == 0, ended.err
    assert ended.out == f"{hub.url}/{REPO}\n"
    assert hub.files(REPO) == contents(out)
    assert hub.repos[REPO].messages == ["The first"]
    assert not hub.repos[REPO].private
    assert hub.objects, "large files go by LFS"
    assert {"README.md", "quality.png", "moefuse_card.json"} < hub.files(REPO).keys()


def test_again_into_a_private_branch(checkpoint: Path, hub: Hub) -> None:
    hub.repos[REPO] = Repo(private=True)

    ended = run(hub.url, checkpoint, REPO, "--no-dry-run", "--private", "--revision", "v2")

    assert ended.status == 0, ended.err
    assert ended.out == f"{hub.url}/{REPO}/tree/v2\n"
    assert hub.files(REPO, "v2") == contents(checkpoint)
    assert hub.files(REPO) == {}


def test_a_new_private_repository(checkpoint: Path, hub: Hub) -> None:
    assert run(hub.url, checkpoint, REPO, "--no-dry-run", "--private").status == 0

    assert hub.repos[REPO].private
    assert hub.files(REPO) == contents(checkpoint)


def test_older_weights_do_not_stay_beside_newer_ones(checkpoint: Path, hub: Hub) -> None:
    older = {"model.safetensors": b"old", "notes.md": b"kept", ".gitattributes": b"kept"}
    hub.repos[REPO] = Repo(private=False, branches={"main": dict(older)})
    del older["model.safetensors"]

    assert run(hub.url, checkpoint, REPO, "--no-dry-run").status == 0

    assert hub.files(REPO) == {**older, **contents(checkpoint)}


# What a dry run shows.


def test_a_dry_run_is_the_default_and_asks_the_hub_nothing(checkpoint: Path, hub: Hub) -> None:
    ended = run(hub.url, checkpoint, REPO, "--private", token=None)

    assert ended.status == 0, ended.err
    assert hub.requests == []
    files = contents(checkpoint)
    for name, content in files.items():
        assert f"  {name} " in ended.out and f"{len(content):,}\n" in ended.out
    total = sum(map(len, files.values()))
    assert f"{len(files)} files, {total:,} bytes" in ended.out
    assert f"{REPO} (private, where it is new)" in ended.out
    command = f"moefuse push {checkpoint} {REPO} --no-dry-run --private"
    assert ended.out.endswith(f"Nothing was uploaded. To do so:\n  {command}\n")


def test_a_card_without_a_licence_is_pointed_out(checkpoint: Path) -> None:
    assert "names no licence" not in describe(prepare(checkpoint, REPO))
    (checkpoint / "README.md").write_text("# x\n")

    assert "README.md names no licence" in describe(prepare(checkpoint, REPO))


# What is refused without the hub.


@pytest.mark.parametrize("repo", ["", "a/b/c", "a b", "a/b--c", "/home/x", "a/-b", "a/b.git"])
def test_names_that_cannot_be(repo: str, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="cannot be the name of a repository"):
        prepare(checkpoint, repo)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("optimizer.pt", "of a kind that no checkpoint has"),
        ("data.parquet", "of a kind that no checkpoint has"),
        ("stray.safetensors", "of a kind that no checkpoint has"),
        ("checkpoint-5/model.safetensors", "of a kind that no checkpoint has"),
        (".env", "a hidden file"),
        (".git/config.json", "a hidden file"),
        ("student.work/checked-1.json", "an unfinished one"),
        ("model.safetensors.partial", "an unfinished one"),
    ],
)
def test_what_has_no_place_in_a_checkpoint(name: str, told: str, checkpoint: Path) -> None:
    path = checkpoint / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")

    with pytest.raises(UserError, match=told) as refused:
        prepare(checkpoint, REPO)
    assert str(path) in str(refused.value)


def test_big_files_that_are_no_weights(checkpoint: Path) -> None:
    with (checkpoint / "log.txt").open("wb") as file:
        file.truncate(70_000_000)

    with pytest.raises(UserError, match="has 70 MB and is none of the checkpoint's weights"):
        prepare(checkpoint, REPO)


@pytest.mark.parametrize("is_directory", [False, True])
def test_links_out_of_the_directory(is_directory: bool, checkpoint: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("x")
    (checkpoint / "notes.txt").symlink_to(tmp_path if is_directory else secret)

    with pytest.raises(UserError, match="outside the checkpoint"):
        prepare(checkpoint, REPO)


def test_usual_files_beside_the_weights_are_fine(checkpoint: Path) -> None:
    more = ("LICENSE", "LICENSE-MODEL", "NOTICE", "vocab.txt", "a/b.jinja", ".gitattributes")
    for name in more:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("x")

    assert set(more) < prepare(checkpoint, REPO).files.keys()


def test_what_is_no_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no directory"):
        prepare(tmp_path / "missing", REPO)
    (checkpoint / "README.md").unlink()
    with pytest.raises(UserError, match=r"has no README\.md"):
        prepare(checkpoint, REPO)
    next(checkpoint.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="safetensors"):
        prepare(checkpoint, REPO)
    (checkpoint / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        prepare(checkpoint, REPO)


# How failures are told.


def test_without_a_token(checkpoint: Path, hub: Hub) -> None:
    ended = run(hub.url, checkpoint, REPO, "--no-dry-run", token=None)

    assert (ended.status, ended.out, hub.requests) == (2, "", [])
    assert "There is no token for the hub; log in with `hf auth login`" in last_line(ended)


def test_with_a_wrong_token(checkpoint: Path, hub: Hub) -> None:
    ended = run(hub.url, checkpoint, REPO, "--no-dry-run", token="hf_wrong")

    assert (ended.status, ended.out, hub.repos) == (2, "", {})
    assert "(status 401): the token is not valid; log in anew" in last_line(ended)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (("/api/repos/create|/api/models", 403), "(status 403): the token may not write to"),
        (("/api/repos/create", 500), "(status 500): the hub itself failed; try the same"),
        (("/api/repos/create", 429), "(status 429): "),
        (("/preupload/", 404), f"(status 404): there is no {REPO}"),
        (("/commit/", 500), "(status 500): the hub itself failed"),
        (("/api/repos/create", "drop"), "could not be reached while uploading"),
        (("/commit/", "drop"), "could not be reached while uploading"),
    ],
)
def test_a_failing_hub(fault: tuple[str, int | str], told: str, checkpoint: Path, hub: Hub) -> None:
    hub.faults.append(fault)

    ended = run(hub.url, checkpoint, REPO, "--no-dry-run")

    assert (ended.status, ended.out) == (2, "")
    assert told in last_line(ended), ended.err
    assert last_line(ended).startswith("moefuse: ") and last_line(ended).endswith(".")
    assert REPO not in hub.repos or not hub.files(REPO)

    hub.faults.clear()
    assert run(hub.url, checkpoint, REPO, "--no-dry-run").status == 0
    assert hub.files(REPO) == contents(checkpoint)


def test_no_hub_at_all(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        ended = run(f"http://127.0.0.1:{taken.getsockname()[1]}", checkpoint, REPO, "--no-dry-run")

    assert (ended.status, ended.out) == (2, "")
    assert "could not be reached while uploading to" in last_line(ended)


def test_what_should_be_private_never_becomes_public(checkpoint: Path, hub: Hub) -> None:
    hub.repos[REPO] = Repo(private=False)

    ended = run(hub.url, checkpoint, REPO, "--no-dry-run", "--private")

    assert ended.status == 2
    assert f"{REPO} exists already and is public, so nothing was uploaded" in last_line(ended)
    assert hub.files(REPO) == {}


def test_a_card_that_the_hub_refuses(checkpoint: Path, hub: Hub) -> None:
    (checkpoint / "README.md").write_text("no metadata")

    ended = run(hub.url, checkpoint, REPO, "--no-dry-run")

    assert ended.status == 2
    assert "was refused (Invalid metadata in README.md. - no metadata)" in last_line(ended)
    assert hub.files(REPO) == {}

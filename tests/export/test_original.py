"""Who the original of a student is, by its place, its card and its directory."""

from collections.abc import Callable
from pathlib import Path

import pytest

from moefuse.checkpoint.reader import CheckpointReader
from moefuse.export.original import front_matter, original_of
from moefuse.export.record import Base

Tiny = Callable[..., Path]


def original(directory: Path) -> Base:
    return original_of(CheckpointReader.open(directory))


def test_a_directory_goes_by_its_own_name(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()

    assert original(directory) == Base(directory.name, directory.name)


def test_no_path_of_the_machine_is_told(
    tiny_checkpoint: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_checkpoint()
    monkeypatch.chdir(directory)

    assert original(Path()) == Base(directory.name, directory.name)
    odd = directory.rename(directory.with_name("my moe, v2"))
    assert original(odd) == Base("my moe, v2", None)


def test_a_snapshot_of_the_hub(tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--some-org--some.model" / "snapshots" / commit
    place.parent.mkdir(parents=True)
    tiny_checkpoint().rename(place)
    (place / "README.md").write_text("---\nlicense: mit\nbase_model: another/one\n---\n# x\n")

    found = original(place)

    hub_id = "some-org/some.model"
    assert found == Base(hub_id, hub_id, commit, {"license": "mit"})


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("base_model: org/first", "org/first"),
        ("base_model: [org/first]", "org/first"),
        ("base_model: [org/first, org/second]", None),
        ("base_model: /home/somebody/model", None),
        ("base_model: 3", None),
    ],
)
def test_its_own_cards_base_model(line: str, wanted: str | None, tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "README.md").write_text(f"---\n{line}\n---\n# x\n")

    assert original(directory).base_model == (wanted or directory.name)


def test_only_what_holds_on_is_carried_over(tiny_checkpoint: Tiny) -> None:
    directory = tiny_checkpoint()
    (directory / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage: [en, code]\n"
        "tags: [x]\nmodel-index: [1]\npipeline_tag: 2024-01-01\nextra: 1\n---\n# x\n"
    )

    assert original(directory).metadata == {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "code"],
    }


@pytest.mark.parametrize(
    "text",
    ["", "# no block", "---\n[1]\n---\n", "---\na: [\n---\n", "---\n{: :}\n---\n", "\xff\xfe\x00"],
)
def test_a_strangers_card_never_stops_anything(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode("latin-1"))

    assert front_matter(tmp_path / "README.md") == {}
    assert front_matter(tmp_path / "missing.md") == {}

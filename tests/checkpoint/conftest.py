from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The hub's cache, with ``some/model`` in it as a download leaves it: links to blobs."""
    cache = tmp_path / "cache"
    repository = cache / "models--some--model"
    snapshot = repository / "snapshots" / REVISION
    blobs = repository / "blobs"
    for directory in (snapshot, blobs, repository / "refs"):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(tiny_checkpoint().iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache

"""The picture of a model card: a point and its interval for every stage, the same bytes twice."""

from pathlib import Path

import pytest
from PIL import Image

from moefuse.errors import UserError
from moefuse.evaluation.rows import Row
from moefuse.evaluation.stage_plot import stage_plot

ROWS = [
    Row(method="s", stage="one-shot", kl=0.8, agreement=0.6, intervals={"kl": (0.7, 0.9)}),
    Row(method="s", stage="distilled", kl=0.4, agreement=0.8),
    Row(method="s", stage="healed", kl=0.2, agreement=None),
]


def test_a_picture_grows_with_its_stages_and_is_the_same_twice(tmp_path: Path) -> None:
    sizes = []
    for count in (1, 3):
        for name in ("a.png", "b.png"):
            stage_plot(ROWS[:count], tmp_path / name)
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
        with Image.open(tmp_path / "a.png") as image:
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0] == 1080
    assert sizes[0][1] < sizes[1][1]


def test_an_exact_copy_can_be_drawn(tmp_path: Path) -> None:
    stage_plot([Row(method="s", stage="distilled", kl=0.0, agreement=1.0)], tmp_path / "a.png")

    assert (tmp_path / "a.png").stat().st_size > 1000


def test_nothing_to_plot_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to plot"):
        stage_plot([Row(method="s", stage="distilled")], tmp_path / "a.png")

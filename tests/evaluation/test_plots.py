from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from moefuse.errors import UserError
from moefuse.evaluation import plots
from moefuse.evaluation.plots import can_plot, quality_plot
from moefuse.evaluation.report import Row

TEACHER = Row(method="teacher", expert_bytes=64_000, perplexity=5.0, kl=0.0)
ROWS = [
    Row(
        method=method,
        groups=groups,
        rank=4 if method == "fused" else None,
        stage=stage,
        seed=seed,
        expert_bytes=groups * 1000,
        kl=(1 + seed / 20) / groups / (2 if stage == "distilled" else 1),
    )
    for method in ("fused", "reap")
    for groups in (2, 4)
    for stage in ("one-shot", "distilled")
    for seed in (0, 1)
]


def drawn(rows: list[Row], teacher: Row | None) -> Figure:
    figure = Figure()
    plots._draw(figure.add_subplot(), rows, teacher)
    return figure


def test_a_picture_is_written_and_the_same_twice(tmp_path: Path) -> None:
    quality_plot([TEACHER, *ROWS], tmp_path / "a.png")
    quality_plot([TEACHER, *ROWS], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1080, 675)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_lines_are_means_over_seeds_as_shares_of_the_teacher() -> None:
    axes = drawn(ROWS, TEACHER).axes[0]
    lines = {
        (line.get_color(), line.get_linestyle()): line.get_xydata().tolist()  # type: ignore[union-attr]
        for line in axes.lines
    }
    assert len(lines) == 4
    solid = lines[plots.COLOURS[0], "-"]
    assert solid[0] == pytest.approx([2 / 64, 1.025 / 4])
    assert solid[1] == pytest.approx([4 / 64, 1.025 / 8])
    assert sorted(text.get_text() for text in axes.texts) == ["2", "4"], "only fused"
    assert axes.get_xlabel().endswith("share of the teacher's")


def test_without_a_teacher_sizes_are_bytes() -> None:
    axes = drawn(ROWS[:1], None).axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[2000.0, 0.5]]  # type: ignore[union-attr]
    assert any(label.get_text().endswith("kB") for label in axes.get_xticklabels())
    assert axes.get_ylim()[0] == 0


def test_a_wide_range_is_drawn_on_a_log_axis() -> None:
    rows = [Row(method="fused", expert_bytes=size, kl=1 / size**2) for size in (1, 4, 30)]
    axes = drawn(rows, None).axes[0]
    assert axes.get_yscale() == "log"
    assert not axes.texts


def test_nothing_to_plot_is_told(tmp_path: Path) -> None:
    rows = [TEACHER, Row(method="fused", kl=1.0), Row(method="fused", expert_bytes=1, kl=0.0)]
    assert not can_plot(rows)
    with pytest.raises(UserError, match="nothing to plot"):
        quality_plot(rows, tmp_path / "a.png")


@pytest.mark.parametrize("span", [1.0, 1.01, 3.0, 40.0, 300.0, 1e6])
def test_every_size_axis_has_a_few_ticks(span: float) -> None:
    for size in (1.02, 840.0, 7.3e9):
        rows = [Row(method="fused", expert_bytes=int(size * 1e3 * x), kl=1.0) for x in (1, span)]
        assert 2 <= len(drawn(rows, None).axes[0].get_xticks()) <= 12

"""Progress goes to standard error, in lines that logs can keep."""

import io
import re

import pytest

from moefuse import console


def test_lines_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(console.track([3, 1, 2], "Count [x]")) == [3, 1, 2]

    printed = capfd.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"Count \[x\]: 3/3, [\d.]+/s, 0 s left\n", printed.err)


def test_a_line_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)

    assert sum(console.track(iter(range(4)), "Sum", total=4)) == 6

    assert [line.split(",")[0] for line in capfd.readouterr().err.splitlines()] == [
        "Sum: 1/4",
        "Sum: 2/4",
        "Sum: 3/4",
        "Sum: 4/4",
    ]


def test_nothing_to_do_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(console.track([], "Nothing")) == []
    assert capfd.readouterr().err == ""


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    assert list(console.track([1, 2], "Bar")) == [1, 2]

    assert "Bar" in terminal.getvalue()
    assert "2/2" in terminal.getvalue()
    assert capfd.readouterr().out == ""


def test_long_messages_stay_on_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    console.say("word " * 100 + "[bold]end[/bold]")

    assert capfd.readouterr().err == "word " * 100 + "[bold]end[/bold]\n"


def test_a_meter_tells_lines_now_and_then_and_at_the_end(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.Meter("Heal", 10, done=4) as meter:
        meter.reach(5)
        meter.reach(10, "(loss 0.5)")
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"Heal \(loss 0.5\): 10/10, [\d.]+/s, 0 s left", line)

    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with console.Meter("Heal", 10) as meter:
        meter.reach(5)
    assert capfd.readouterr().err.startswith("Heal: 5/10, ")

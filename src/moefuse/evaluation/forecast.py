"""What quality a student will have, foretold from a measured grid (``scaling.json``)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefuse import artifacts
from moefuse.errors import UserError
from moefuse.evaluation.report import read_report
from moefuse.evaluation.scaling import JointLaws, joint_laws, measured
from moefuse.mathematics.curves import Interval


@dataclass(frozen=True)
class Expected:
    """The KL to expect of a student healed on ``tokens`` (0: not healed), with its 95% interval.

    ``beyond`` are the variables, of groups, rank and tokens, that lie outside what was measured.
    """

    tokens: int
    kl: float
    interval: Interval
    beyond: tuple[str, ...]


@dataclass(frozen=True)
class Forecast:
    """What a grid measured on ``teacher`` says of one student; ``is_same_teacher`` whether the
    student is to be made of a teacher of the same configuration."""

    teacher: str
    is_same_teacher: bool
    expected: tuple[Expected, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Experience:
    """A measured grid, ready to foretell; see ``read_experience``.

    ``config`` is the fingerprint of the configuration of the ``teacher``, ``most_tokens`` the most
    that any student was healed on.
    """

    teacher: str
    config: str
    laws: JointLaws
    most_tokens: int

    def forecast(
        self, config: Mapping[str, Any], groups: int, rank: int, tokens: int | None
    ) -> Forecast:
        """Foretell a student of the teacher with this ``config``, unhealed and healed.

        ``tokens`` None stands for the most that was measured. Raises ``UserError`` for tokens where
        nothing was healed.
        """
        if tokens and self.laws.healed is None:
            raise UserError(
                "--heal-tokens asks for what this grid has not measured: too few of its students "
                "were healed; leave it out."
            )
        wanted = self.most_tokens if tokens is None else tokens
        found = []
        for law, count in ((self.laws.unhealed, 0), (self.laws.healed, wanted)):
            if law is not None and (count or law is self.laws.unhealed):
                told = law.predict({"groups": groups, "rank": rank, "tokens": count})
                found.append(Expected(count, told.value, told.interval, told.beyond))
        same = artifacts.fingerprint(dict(config)) == self.config
        return Forecast(self.teacher, same, tuple(found))


def read_experience(path: str | Path) -> Experience:
    """Read a ``scaling.json`` or the folder that holds one, and fit its laws anew.

    Raises ``UserError`` for another file and for a grid too small for any law.
    """
    file = Path(path) / "scaling.json" if Path(path).is_dir() else Path(path)
    meta, rows = read_report(file)
    teacher = meta.get("teacher")
    if not isinstance(teacher, dict) or not {"name", "config"} <= teacher.keys():
        raise UserError(f"{file} is no report of 'moefuse scaling'; give its scaling.json.")
    cells = measured(rows)
    laws = joint_laws(cells)
    if laws.healed is None and laws.unhealed is None:
        raise UserError(f"{file} holds too few students for a law; measure a larger grid.")
    most = max((place[2] for place in cells), default=0)
    return Experience(teacher["name"], teacher["config"], laws, most)

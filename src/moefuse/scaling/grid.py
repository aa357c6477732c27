"""What is measured: a student for every number of groups, rank, healing tokens and seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from moefuse.arena.cells import listed
from moefuse.config import SizeConfig, parse_count
from moefuse.errors import UserError
from moefuse.evaluation.scaling import Place
from moefuse.evaluation.scaling_report import LeftOut
from moefuse.families import MoeShape
from moefuse.fusion.plan import make_plan
from moefuse.pipeline import Job
from moefuse.sizes import maximum_rank


@dataclass(frozen=True)
class Student:
    """One student to make and measure; ``tokens`` are those it is healed on, 0 for none."""

    groups: int
    rank: int
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        """The name of the student's file, without its ending; no other student has it."""
        return f"groups{self.groups}-rank{self.rank}-tokens{self.tokens}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """What to measure, checked: raises ``UserError`` for what makes no sense.

    Students that are not healed belong to every grid: ``tokens`` 0 need not be given. ``middle`` is
    the point through which the laws are read, without one the largest of every axis; with ``cross``
    only the axes through it are measured, not the full product. ``first_seed`` is the first of
    ``seeds``.
    """

    groups: tuple[int, ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    seeds: int = 1
    first_seed: int = 0
    cross: bool = False
    middle: Place | None = None

    def __post_init__(self) -> None:
        for flag, values, least in (
            ("--groups", self.groups, 1),
            ("--ranks", self.ranks, 0),
            ("--tokens", self.tokens, 0),
        ):
            if not values:
                raise UserError(f"{flag} names nothing; give at least one number.")
            if min(values) < least:
                raise UserError(f"{flag} has {min(values)}; it must be at least {least}.")
        if self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; it must be at least 1.")
        for value, values in zip(self.middle or (), self._axes, strict=False):
            if value not in values:
                known = ", ".join(map(str, values))
                raise UserError(f"--middle has {value}, which is not on its axis: {known}.")

    @property
    def _axes(self) -> tuple[tuple[int, ...], ...]:
        return self.groups, self.ranks, self.tokens

    @property
    def centre(self) -> Place:
        """The point through which the laws are read: (groups, rank, tokens)."""
        return self.middle or (max(self.groups), max(self.ranks), max(self.tokens))

    def students(self) -> list[Student]:
        """List every student of the grid, in no particular order."""
        healed = [
            place
            for place in product(*self._axes)
            if not self.cross or sum(a != b for a, b in zip(place, self.centre, strict=True)) <= 1
        ]
        unhealed = [(groups, rank, 0) for groups, rank, _ in healed]
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        places = dict.fromkeys([*unhealed, *healed])
        return [Student(g, r, tokens, seed) for g, r, tokens in places for seed in seeds]

    def within(self, shape: MoeShape) -> tuple["Grid", list[LeftOut]]:
        """Return what of the grid can exist for this teacher, and what cannot, with the reason.

        Raises ``UserError`` where nothing is left of an axis.
        """
        most = maximum_rank(shape)
        left_out = [
            LeftOut("groups", value, f"A layer has only {shape.experts} experts.")
            for value in self.groups
            if value > shape.experts
        ]
        left_out += [
            LeftOut("ranks", value, f"No delta of this model can have a rank above {most}.")
            for value in self.ranks
            if value > most
        ]
        gone = {(item.axis, item.value) for item in left_out}
        groups = tuple(value for value in self.groups if ("groups", value) not in gone)
        ranks = tuple(value for value in self.ranks if ("ranks", value) not in gone)
        for flag, values in (("groups", groups), ("ranks", ranks)):
            if not values:
                reason = next(item.reason for item in left_out if item.axis == flag)
                raise UserError(f"No value of --{flag} is possible. {reason}")
        return replace(self, groups=groups, ranks=ranks), left_out


def read_grid(
    groups: str,
    ranks: str,
    tokens: str,
    seeds: int,
    *,
    first_seed: int = 0,
    cross: bool = False,
    middle: str | None = None,
) -> Grid:
    """Read what the command line says, lists with commas between; raises ``UserError``."""
    place = None
    if middle is not None:
        words = [word.strip() for word in middle.split(",")]
        if len(words) != 3 or not all(word.isdecimal() for word in words[:2]):
            raise UserError(
                f"--middle is {middle!r}; give groups, rank and tokens, such as 8,8,4M."
            )
        place = (int(words[0]), int(words[1]), _count(words[2], "--middle"))
    return Grid(
        groups=listed("--groups", groups, int),
        ranks=listed("--ranks", ranks, int),
        tokens=tuple(_count(word, "--tokens") for word in listed("--tokens", tokens, str)),
        seeds=seeds,
        first_seed=first_seed,
        cross=cross,
        middle=place,
    )


def _count(word: str, flag: str) -> int:
    return 0 if word == "0" else parse_count(word, flag)


def cheapest_first(students: Sequence[Student], job: Job) -> list[Student]:
    """Sort students by what they cost: healing tokens times the parameters that a token passes."""
    kinds = {(student.groups, student.rank) for student in students}
    active = {kind: _active_parameters(job, *kind) for kind in kinds}

    def cost(student: Student) -> tuple[int, ...]:
        passed = active[student.groups, student.rank]
        return student.tokens * passed, passed, student.groups, student.rank, student.seed

    return sorted(students, key=cost)


def _active_parameters(job: Job, groups: int, rank: int) -> int:
    """Return the parameters of one kind of student that a token passes at most."""
    size = SizeConfig(groups=groups, rank=rank)
    return make_plan(job.sizes, size, job.factoring).active_parameters

"""Which method is best at which size: pure functions of rows.

A point is everything that differs by the seed only; its figures are means. Rows of several stages
are points of their own, so give those of one stage to compare methods.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from moefuse.arena.cells import FUSED, FUSED_BF16, OURS, WHOLE
from moefuse.evaluation.rows import TEACHER, Row, mean_of, stage_order

SLACK = 1.01
"""By how much a size may exceed its budget: index maps come on top of a budget."""
TEACHER_BITS = 16.0


@dataclass(frozen=True)
class Point:
    """One setting of a method, measured with one or more seeds."""

    method: str
    bits: float | None
    fraction: float | None
    stage: str | None
    rows: tuple[Row, ...]

    @property
    def kls(self) -> list[float]:
        """The KL of every seed."""
        return [row.kl for row in self.rows if row.kl is not None]

    @property
    def kl(self) -> float:
        """The mean KL."""
        return mean(self.kls)

    @property
    def deviation(self) -> float | None:
        """The standard deviation of the KL over seeds; None for one seed."""
        return stdev(self.kls) if len(self.kls) > 1 else None

    @property
    def bpw(self) -> float:
        """The bits stored for each of the teacher's numbers; with several seeds the most."""
        return max(row.bpw for row in self.rows if row.bpw is not None)

    def mean(self, name: str) -> float | None:
        """Return the mean of a figure that rows have."""
        return mean_of(self.rows, name)


@dataclass(frozen=True)
class Ratio:
    """The best of this design and the best rival within ``budget`` bits per number of the
    teacher's routed experts; None where nothing fits."""

    budget: float
    ours: Point | None
    rival: Point | None

    @property
    def value(self) -> float | None:
        """The rival's KL over ours: above 1, ours is better."""
        if self.ours is None or self.rival is None or not self.ours.kl:
            return None
        return self.rival.kl / self.ours.kl


def points(rows: Iterable[Row]) -> list[Point]:
    """Return every point of the rows that have a size and a KL, in the order of the rows."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.method != TEACHER and row.kl is not None and row.bpw is not None:
            key = (row.method, row.bits, row.fraction, row.stage)
            found.setdefault(key, []).append(row)
    return [Point(*key, rows=tuple(same)) for key, same in found.items()]


def last_stage(rows: Iterable[Row]) -> list[Row]:
    """Return the rows of the last stage that there is."""
    staged = [row for row in rows if row.stage is not None]
    last = max((row.stage for row in staged), key=stage_order, default=None)
    return [row for row in staged if row.stage == last]


def pareto_front(rows: Iterable[Row]) -> list[Point]:
    """Return the points that none of the others beats, smallest first.

    One beats another if it is no larger and no worse, and not the same in both.
    """
    front: list[Point] = []
    for point in sorted(points(rows), key=lambda point: (point.bpw, point.kl)):
        if not front or point.kl < front[-1].kl or _same(point, front[-1]):
            front.append(point)
    return front


def _same(one: Point, other: Point) -> bool:
    return (one.bpw, one.kl) == (other.bpw, other.kl)


def best_at(rows: Iterable[Row], bpw: float) -> dict[str, Point]:
    """Return every method's point of the lowest KL among those of at most ``bpw`` bits.

    ``SLACK`` is allowed for. Methods of which nothing is that small are left out.
    """
    fitting = [point for point in points(rows) if point.bpw <= bpw * SLACK]
    names = dict.fromkeys(point.method for point in fitting)
    return {
        name: min((p for p in fitting if p.method == name), key=lambda point: point.kl)
        for name in names
    }


def budgets(rows: Sequence[Row]) -> dict[float, float]:
    """Return the budgets that rows were made for, largest first: share, and bits per number."""
    teacher = next((row.bpw for row in rows if row.method == TEACHER), None) or TEACHER_BITS
    shares = sorted({row.fraction for row in rows if row.fraction is not None}, reverse=True)
    return {share: share * teacher for share in shares}


def ratio_table(rows: Sequence[Row], *, ours: str = FUSED) -> list[Ratio]:
    """Return this design against the best rival at every budget, last stage, largest first.

    Every rival stands at its best number of bits within the budget's bytes. ``ours`` names the
    variant of this design; the other is left out.
    """
    measured = last_stage(rows)
    found = []
    for budget in budgets(rows).values():
        best = best_at(measured, budget)
        rivals = [point for name, point in best.items() if name not in OURS]
        rival = min(rivals, key=lambda point: point.kl, default=None)
        found.append(Ratio(budget, best.get(ours), rival))
    return found


def ratio_table_16_bits(rows: Sequence[Row]) -> list[Ratio]:
    """Return the same at equal parameters: only students whose numbers all have 16 bits."""
    whole = [row for row in rows if row.method == TEACHER or row.bits == WHOLE]
    return ratio_table(whole, ours=FUSED_BF16)

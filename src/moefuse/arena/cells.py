"""What is compared: one cell for every method, number of bits, budget and seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from moefuse.baselines import method, method_names
from moefuse.errors import UserError
from moefuse.mathematics.quantization import WORDS

FUSED, FUSED_BF16 = "fused", "fused-bf16"
OURS = (FUSED, FUSED_BF16)
"""This design: its bits chosen by the planner, and all numbers in 16 bits."""
WHOLE = 16.0
"""Bits of a number that is not rounded to few."""
ALL = "all"
INSIDE, AFTER = "inside", "after"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Cell:
    """One student to make and measure.

    ``bits`` of a stored number (None: chosen by the planner), ``fraction`` of the bytes of the
    teacher's routed experts that it may take (None: its size is what ``bits`` takes).
    """

    method: str
    bits: float | None
    fraction: float | None
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's file, without its ending; no other cell has it."""
        bits = "" if self.bits is None else f"-{self.bits:g}bit"
        fraction = "" if self.fraction is None else f"-{self.fraction!r}"
        return f"{self.method}{bits}{fraction}-seed{self.seed}"


@dataclass(frozen=True)
class Wishes:
    """What to compare, checked: raises ``UserError`` for what does not exist or makes no sense.

    ``bits`` are those of structural rivals, ``first_seed`` the first of ``seeds``; ``quantise``
    says whether few bits are trained with (``inside``) or come after distillation (``after``).
    """

    methods: tuple[str, ...]
    fractions: tuple[float, ...]
    seeds: int
    first_seed: int = 0
    bits: tuple[float, ...] = (WHOLE, 4, 2)
    quantise: str = INSIDE

    def __post_init__(self) -> None:
        known = contestants()
        for name in self.methods:
            if name not in known:
                raise UserError(f"There is no method {name!r}; choose from {', '.join(known)}.")
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise UserError(f"--fractions has {fraction:g}; a share lies above 0, up to 1.")
        for bits in self.bits:
            if bits not in (WHOLE, *WORDS):
                choices = ", ".join(f"{b:g}" for b in (WHOLE, *WORDS))
                raise UserError(f"--bits has {bits:g}; choose from {choices}.")
        if self.seeds < 1:
            raise UserError(f"--seeds is {self.seeds}; it must be at least 1.")
        if self.quantise not in (INSIDE, AFTER):
            raise UserError(f"--quantise is {self.quantise!r}; choose {INSIDE} or {AFTER}.")

    def cells(self) -> list[Cell]:
        """List every cell: methods in the order given, then bits, budgets and seeds."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [
            Cell(name, bits, fraction, seed)
            for name in self.methods
            for bits, fraction in self._sizes(name)
            for seed in seeds
        ]

    def _sizes(self, name: str) -> list[tuple[float | None, float | None]]:
        if not is_structural(name):
            return [(bits, None) for bits in method(name).BITS]
        choices = {FUSED: (None,), FUSED_BF16: (WHOLE,)}.get(name, self.bits)
        return [(bits, fraction) for bits in choices for fraction in self.fractions]


def contestants() -> list[str]:
    """List this design's names and every rival's."""
    return [*OURS, *method_names()]


def is_structural(name: str) -> bool:
    """Say whether a method's size is chosen by a budget, not by the bits of its numbers."""
    return name in OURS or hasattr(method(name), "compress")


def read_wishes(
    methods: str,
    fractions: str,
    bits: str,
    seeds: int,
    *,
    first_seed: int = 0,
    quantise: str = INSIDE,
) -> Wishes:
    """Read what the command line says, lists with commas between; raises ``UserError``."""
    return Wishes(
        methods=tuple(contestants()) if methods == ALL else listed("--methods", methods, str),
        fractions=listed("--fractions", fractions, float),
        seeds=seeds,
        first_seed=first_seed,
        bits=listed("--bits", bits, float),
        quantise=quantise,
    )


def listed(flag: str, text: str, read: Callable[[str], Value]) -> tuple[Value, ...]:
    """Read a flag's values with commas between, each once; raises ``UserError``."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        found = tuple(dict.fromkeys(read(word) for word in words))
    except ValueError:
        raise UserError(f"{flag} is {text!r}; give numbers with commas between.") from None
    if not found:
        raise UserError(f"{flag} names nothing; give at least one, more with commas between.")
    return found


def part_of(cells: Sequence[Value], part: str | None) -> list[Value]:
    """Return the cells of ``part``, ``I/N``: every N-th from the I-th on, counted from 0.

    None is all of them. Raises ``UserError`` for anything else.
    """
    if part is None:
        return list(cells)
    number, slash, parts = part.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise UserError(f"--part is {part!r}; give a part such as 0/4, the first of four.")
    return list(cells[int(number) :: int(parts)])

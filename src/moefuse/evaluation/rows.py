"""The row: one measured model, the one kind of result that every command writes."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from statistics import mean

TEACHER = "teacher"
STAGES = ("one-shot", "distilled", "healed")

TaskScores = dict[str, dict[str, float | None]]
"""``{task: {metric: value, metric_stderr: value}}``; None where an error is not known."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured model; None where something does not apply or was not measured."""

    method: str
    """``teacher``, ``fused``, ``reap``, ``hc-smoe``, ``quantized``, ..."""
    groups: int | None = None
    """Fused or kept experts of a layer."""
    rank: int | None = None
    bits: float | None = None
    """Bits per stored number of an expert."""
    seed: int | None = None
    stage: str | None = None
    """``one-shot``, ``distilled`` or ``healed``."""
    tokens: int | None = None
    """Predicted tokens that the figures are means of."""
    parameters: int | None = None
    active_parameters: int | None = None
    """Parameters that a token passes at most."""
    expert_bytes: int | None = None
    total_bytes: int | None = None
    """Bytes stored: of the routed experts, and of all tensors."""
    kl: float | None = None
    cross_entropy: float | None = None
    """Nats per token."""
    perplexity: float | None = None
    agreement: float | None = None
    """Share of tokens, 0 to 1, where the first choice is the teacher's."""
    seconds: float | None = None
    peak_bytes: int | None = None
    intervals: dict[str, tuple[float, float]] | None = None
    """95 % interval of a metric, by its name."""
    tasks: TaskScores | None = None
    """Scores of lm-evaluation-harness's tasks."""
    bpw: float | None = None
    """Bits stored for each number of the teacher's routed experts."""
    fraction: float | None = None
    """The budget, as a share of the bytes of the teacher's routed experts."""
    advice: str | None = None
    """In plain words what a student under a budget is, such as "quantise, do not fuse"."""
    healed_tokens: int | None = None
    """Tokens that the whole student was trained on after its layers were; 0 where it was not."""


@dataclass(frozen=True)
class Setting:
    """What tells rows of one method and stage apart, the seed left aside."""

    groups: int | None
    rank: int | None
    bits: float | None
    fraction: float | None = None
    healed_tokens: int | None = None

    def order(self) -> tuple[float, ...]:
        """Return a sort key; what is not known comes first."""
        return tuple(-1 if x is None else x for x in astuple(self))

    def label(self, names: Sequence[str]) -> str:
        """Return the named values that are known, as people read them: ``G = 8, R = 16``."""
        words = {
            "groups": "G = {}",
            "rank": "R = {}",
            "bits": "{:g}-bit",
            "fraction": "{:g} of the bytes",
            "healed_tokens": "healed on {:,} tokens",
        }
        values = {name: getattr(self, name) for name in names}
        return ", ".join(words[name].format(x) for name, x in values.items() if x is not None)


def setting(row: Row) -> Setting:
    """Return what a row must share with another of its method and stage to differ by seed only."""
    return Setting(row.groups, row.rank, row.bits, row.fraction, row.healed_tokens)


def stage_order(stage: str | None) -> tuple[int, str]:
    """Return a sort key that puts stages in the order in which they happen."""
    known = STAGES.index(stage) if stage in STAGES else len(STAGES)
    return known, stage or ""


def mean_of(rows: Iterable[Row], name: str) -> float | None:
    """Return the mean of a row's figure over the rows that have it, or None where none has."""
    values = [getattr(row, name) for row in rows if getattr(row, name) is not None]
    return mean(values) if values else None

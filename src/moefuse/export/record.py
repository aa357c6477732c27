"""What a model card tells, as plain values: the one record that its text is made from.

The record lies beside the card, in ``moefuse_card.json``. A later stage reads it, adds what it did
and measured, and has the card written anew; nothing is ever read back from the card's prose.

Paths of a machine have no place in it: texts and checkpoints are named by file or by hub id.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from moefuse import artifacts
from moefuse.errors import UserError

RECORD = "moefuse_card.json"
PLOT = "quality.png"
VERSION = 1

Interval = tuple[float, float]


@dataclass(frozen=True)
class Base:
    """The checkpoint that the student was made from.

    ``name`` is how prose calls it; ``base_model`` what the hub is told, a hub id or a directory's
    name, None where neither will do; ``revision`` the commit, where it came from the hub;
    ``metadata`` the fields of its card's front matter that hold for the student too.
    """

    name: str
    base_model: str | None = None
    revision: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What became of the routed experts: shared bases with deltas, or own neurons.

    ``experts`` a layer of the original has, of which a token chooses ``top_k``, in ``layers``
    layers. Of bases: ``groups`` (G) and ``rank`` (R); ``multiplexed`` says by which words of the
    release of 2025 they were made, where they were. Of own neurons: how many of all layers there
    are by their bits, the most that a layer ``shared`` among its experts, the share ``kept`` (0 to
    1), the ``mean_bits`` of a number, the share of ``energy_lost`` and the planner's ``advice``.
    """

    experts: int
    top_k: int
    layers: int
    groups: int | None = None
    rank: int | None = None
    multiplexed: str | None = None
    neurons: dict[str, int] | None = None
    shared: int = 0
    kept: float | None = None
    mean_bits: float | None = None
    energy_lost: float | None = None
    advice: str | None = None


@dataclass(frozen=True)
class Size:
    """Parameters, those that a token passes at most, bytes of the routed experts and of all."""

    parameters: int
    active_parameters: int
    expert_bytes: int
    bytes: int


@dataclass(frozen=True)
class Text:
    """A text by its file's name or hub id, and how much of it was used."""

    name: str
    tokens: int
    documents: int | None = None
    sequence_length: int | None = None


@dataclass(frozen=True)
class Distilled:
    """Layer distillation: ``steps`` a layer (0: none) and each layer's relative error.

    ``errors`` are ``{"before", "after"}`` by the layer's number as text.
    """

    steps: int
    errors: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Healed:
    """End-to-end distillation: on which text, by which loss, training what, how many steps.

    ``loss`` and ``trained`` are phrases for people, such as "forward KL at temperature 1" and
    "deltas, scales and biases"; ``details`` are further settings, shown as they are.
    """

    data: Text
    loss: str
    trained: str
    steps: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """What was measured of one stage of the student, or of the teacher.

    ``stage`` is ``teacher``, ``one-shot``, ``distilled``, ``healed`` or any other words. Units are
    those of ``evaluation.rows.Row``; ``intervals`` are 95 % intervals by metric, over documents.
    """

    stage: str
    cross_entropy: float
    perplexity: float | None = None
    kl: float | None = None
    agreement: float | None = None
    intervals: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Figures of the teacher and of the student's stages, in order, on one text.

    ``note`` says which part of the text this is, where it is not all that its name means.
    """

    data: Text
    stages: tuple[Metrics, ...]
    note: str = ""

    @property
    def has_kl(self) -> bool:
        """Whether any stage was compared with the teacher, so that there is something to plot."""
        return any(stage.kl is not None for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Measured":
        """Return what ``to_json`` made ``value`` of; raises ``KeyError`` or ``TypeError``."""
        stages = []
        for item in value["stages"]:
            metrics = _known(Metrics, item)
            intervals = {name: (low, high) for name, (low, high) in metrics.intervals.items()}
            stages.append(replace(metrics, intervals=intervals))
        return cls(_known(Text, value["data"]), tuple(stages), value.get("note", ""))


@dataclass(frozen=True)
class CardRecord:
    """All that a card tells.

    ``measured`` is None where nothing was, and ``unmeasured`` then a sentence that says why.
    ``healed`` is None until the student is healed.
    """

    name: str
    base: Base
    form: Form
    original: Size
    student: Size
    calibrated: Text
    distilled: Distilled
    healed: Healed | None = None
    measured: Measured | None = None
    unmeasured: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CardRecord":
        """Return the record that ``to_json`` made ``value`` of.

        Raises ``KeyError`` or ``TypeError`` for anything else.
        """
        healed, measured = value.get("healed"), value.get("measured")
        return cls(
            name=value["name"],
            base=_known(Base, value["base"]),
            form=_known(Form, value["form"]),
            original=_known(Size, value["original"]),
            student=_known(Size, value["student"]),
            calibrated=_known(Text, value["calibrated"]),
            distilled=_known(Distilled, value["distilled"]),
            healed=None if healed is None else _known(Healed, healed, data=Text),
            measured=None if measured is None else Measured.from_json(measured),
            unmeasured=value.get("unmeasured"),
        )


def _known(kind: Any, value: Mapping[str, Any], **inner: Any) -> Any:
    """Make a dataclass of a mapping, leaving out fields that a later version may have added."""
    names = {declared.name for declared in fields(kind)}
    given = {name: item for name, item in value.items() if name in names}
    return kind(**{n: _known(inner[n], v) if n in inner else v for n, v in given.items()})


def save_record(directory: Path, record: CardRecord) -> None:
    """Write ``record`` into a checkpoint, whole or not at all."""
    artifacts.write_json(directory / RECORD, record.to_json())


def read_record(directory: Path) -> CardRecord:
    """Read the record of a checkpoint that moefuse wrote; raises ``UserError``."""
    path = directory / RECORD
    try:
        return CardRecord.from_json(artifacts.read_json(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} has no {RECORD}, from which its model card is made; give a checkpoint "
            "that this version of moefuse wrote."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no record of a model card ({type(error).__name__}: {error}); make the "
            "checkpoint anew."
        ) from error

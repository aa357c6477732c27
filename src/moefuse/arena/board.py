"""The finished cells of a measurement, one file each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from moefuse import artifacts
from moefuse.errors import UserError
from moefuse.evaluation.report import Row, row_from_json


class Named(Protocol):
    """A dataclass that says what is measured."""

    @property
    def name(self) -> str:
        """The name of the cell's file, without its ending; no other cell has it."""
        ...


AnyCell = TypeVar("AnyCell", bound=Named)


class Board(Generic[AnyCell]):
    """The finished cells of one ``kind``, in ``directory``, all made with the same ``settings``."""

    def __init__(self, kind: type[AnyCell], directory: Path, settings: dict[str, Any]) -> None:
        self.kind = kind
        self.directory = directory
        self.settings = settings

    def path(self, cell: AnyCell) -> Path:
        """Return the file of one cell."""
        return self.directory / f"{cell.name}.json"

    def has(self, cell: AnyCell) -> bool:
        """Say whether a cell is done; raises ``UserError`` if it was with other settings."""
        path = self.path(cell)
        if not path.exists():
            return False
        if artifacts.read_json(path)["settings"] != self.settings:
            raise UserError(
                f"{path} was measured with other settings or texts; repeat those or choose "
                "another output."
            )
        return True

    def write(self, cell: AnyCell, found: dict[str, Any]) -> None:
        """Keep what was found of a cell."""
        value = {"cell": dict(vars(cell)), "settings": self.settings, **found}
        artifacts.write_json(self.path(cell), value)

    def read(self, cell: AnyCell) -> tuple[list[Row], str | None, dict[str, Any] | None]:
        """Return what is known of a cell.

        These are its rows, the teacher's first; why it is impossible, should it be; and what the
        scores of its tasks depend on, had it any.
        """
        found = artifacts.read_json(self.path(cell))
        rows = [row_from_json(item) for item in found["rows"]]
        return rows, found["impossible"], found.get("tasks")

    def others(self, cells: Sequence[AnyCell]) -> list[AnyCell]:
        """List the finished cells besides ``cells`` that were measured with the same settings."""
        names = {cell.name for cell in cells}
        paths = sorted(self.directory.glob("*.json"))
        found = [artifacts.read_json(path) for path in paths if path.stem not in names]
        return [self.kind(**item["cell"]) for item in found if item["settings"] == self.settings]

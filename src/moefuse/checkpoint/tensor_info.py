"""One tensor of a checkpoint, as headers tell of it."""

import math
from dataclasses import dataclass, field

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint, without its numbers."""

    name: str
    dtype: str
    """The safetensors name: ``"BF16"``, ``"F8_E4M3"``, ..."""
    shape: tuple[int, ...]
    shard: str
    """File name, relative to the checkpoint."""
    begin: int = field(default=0, compare=False)
    """Where its bytes begin in the shard; 0 where only the hub's headers are known."""
    parts: tuple[tuple[str, "TensorInfo"], ...] = ()
    """Of a quantised weight: the stored tensors, each after what it is to the weight."""
    renamed: str | None = None
    """What the shard calls it, where that is not its name."""

    @property
    def numel(self) -> int:
        """How many numbers the tensor has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes in memory, in its own dtype."""
        return self.numel * DTYPE_BITS[self.dtype] // 8

    @property
    def stored_bytes(self) -> int:
        """How many bytes it takes on the disk."""
        return sum(part.nbytes for part in self.stored)

    @property
    def stored_name(self) -> str:
        """What the shard calls it."""
        return self.renamed or self.name

    @property
    def stored(self) -> tuple["TensorInfo", ...]:
        """What lies on the disk: its parts, or the tensor itself."""
        return tuple(part for _, part in self.parts) or (self,)

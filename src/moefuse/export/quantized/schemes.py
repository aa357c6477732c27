"""Which schemes there are, what each needs and what it stores."""

from functools import partial

from moefuse.errors import UserError
from moefuse.export.quantized import compressed, libraries
from moefuse.sizes import StoredBytes

GPTQ, AWQ = "gptq", "awq"
SCHEMES = (*compressed.LAYOUTS, *libraries.SCHEMES)
CALIBRATED = (GPTQ, AWQ)
"""Schemes that need text."""
REFITTED = ("w4a16", *CALIBRATED, *libraries.SCHEMES)
"""Schemes of so few bits that learning to make up for them pays."""


def check_scheme(scheme: str) -> None:
    """Raise ``UserError`` for a scheme that there is not."""
    if scheme not in SCHEMES:
        raise UserError(f"--scheme is {scheme!r}; choose from {', '.join(SCHEMES)}.")


def check_text(scheme: str, data: str | None) -> None:
    """Raise ``UserError`` for a scheme that lacks the text it needs."""
    if scheme in CALIBRATED and data is None:
        raise UserError(
            f"The scheme {scheme} is fitted to text; say with --data which, or use w4a16."
        )


def check_group_size(scheme: str, group_size: int | None) -> None:
    """Raise ``UserError`` for a group size where the scheme has none to choose."""
    layouts = {**compressed.LAYOUTS, **libraries.LAYOUTS}
    grouped = [name for name, layout in layouts.items() if layout.grouped]
    if group_size is not None and scheme not in grouped:
        raise UserError(
            f"--group-size is for {', '.join(grouped)}; how many numbers of {scheme} share a scale "
            "is not to be chosen."
        )


def whole_codes(scheme: str) -> bool:
    """Say whether moefuse itself rounds to whole numbers, which can then learn.

    fp8 has no codes that a small step could change, and a library's codes are its own.
    """
    layout = compressed.LAYOUTS.get(scheme)
    return layout is not None and not layout.is_float


def bytes_of_bases(
    scheme: str, widths: set[int], group_size: int | None, itemsize: int
) -> StoredBytes:
    """Return what tells the bytes of a matrix stored by ``scheme``, one of (O, I) numbers.

    ``widths`` are the rows' lengths that there are, ``itemsize`` the bytes of a plain number.
    Raises ``UserError`` for a scheme that there is not, or whose sizes a library alone knows.
    """
    check_scheme(scheme)
    check_group_size(scheme, group_size)
    layout = compressed.LAYOUTS.get(scheme)
    if layout is None:
        raise UserError(
            f"What {scheme} takes only the library that writes it knows; plan with one of "
            f"{', '.join(compressed.LAYOUTS)}."
        )
    grid = compressed.grid_of(layout, widths, group_size)
    return partial(compressed.stored_bytes, layout, grid, itemsize=itemsize)

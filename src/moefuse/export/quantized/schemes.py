"""Which schemes there are, which are known and cannot be had, and what a scheme stores."""

from functools import partial

from moefuse.errors import UserError
from moefuse.export.quantized import compressed, libraries
from moefuse.sizes import StoredBytes

REFUSED = {
    "awq": "AWQ moves the scales of a layer's inputs into what comes before it; before a base that "
    "is the norm, which router, shared experts and deltas read too. Use gptq, which takes the same "
    "text",
}
"""Schemes that are known and cannot be had, with the reason."""
SCHEMES = (*compressed.LAYOUTS, *libraries.SCHEMES)
CALIBRATED = ("gptq",)


def check_scheme(scheme: str) -> None:
    """Raise ``UserError`` for a scheme that there is not."""
    if scheme in REFUSED:
        raise UserError(f"The scheme {scheme} cannot be had: {REFUSED[scheme]}.")
    if scheme not in SCHEMES:
        raise UserError(f"--scheme is {scheme!r}; choose from {', '.join((*SCHEMES, *REFUSED))}.")


def check_text(scheme: str, data: str | None) -> None:
    """Raise ``UserError`` for a scheme that lacks the text it needs."""
    if scheme in CALIBRATED and data is None:
        raise UserError(
            f"The scheme {scheme} is fitted to text; say with --data which, or use w4a16."
        )


def bytes_of_bases(
    scheme: str, widths: set[int], group_size: int | None, itemsize: int
) -> StoredBytes:
    """Return what tells the bytes of a matrix stored by ``scheme``, one of (O, I) numbers.

    ``widths`` are the rows' lengths that there are, ``itemsize`` the bytes of a plain number.
    Raises ``UserError`` for a scheme that there is not, or whose sizes a library alone knows.
    """
    check_scheme(scheme)
    layout = compressed.LAYOUTS.get(scheme)
    if layout is None:
        raise UserError(
            f"What {scheme} takes only the library that writes it knows; plan with one of "
            f"{', '.join(compressed.LAYOUTS)}."
        )
    grid = compressed.grid_of(layout, widths, group_size)
    return partial(compressed.stored_bytes, layout, grid, itemsize=itemsize)

"""The one error that people are meant to read.

Every mistake a user can make (a wrong path, a budget too small, a damaged shard) raises
:class:`UserError` with one sentence that says what is wrong, where, and what to do. The command
line prints that sentence and exits with status 2; notebooks see an ordinary ``ValueError``.
"""


class UserError(ValueError):
    """Bad input, told in one clear sentence."""

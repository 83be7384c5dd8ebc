"""The one exception for a user's mistake."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Sequence

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, the user's quota, or a limit on the size of files."""
FILES_REFUSED = (*DISK_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)
"""What a file system answers where the user, not the code, can do something about it."""


class UserError(Exception):
    """Something the user can mend: a broken file, a misspelt setting, a missing case.

    The message is one or two sentences that name the file or case, what was found, what was expected and what to do.
    The command line prints it without a traceback and exits with status 1; `GASNetTrainer` turns it into `SystemExit`,
    because a plain exception would reach the user as nnU-Net's traceback.
    """


def hint(name: str, valid: Sequence[str]) -> str:
    """' Did you mean ...?' where something valid is close, else nothing.

    Examples:
        >>> hint("gasent", ["gasnet", "supervised"])
        " Did you mean 'gasnet'?"
    """
    close = difflib.get_close_matches(name, valid, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""

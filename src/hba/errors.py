"""The one error family of hba.

Every error says what is wrong, where it is (file, row, field) and what to do about it, in one message.
`exit_code` is what the command line returns: 1 when the work failed, 2 when the input or the usage is bad, 75 when the
machine asked a command to stop that goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HbaError(Exception):
    """Something failed. `what` is a sentence, `where` a place, `fix` what the user can do."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text.rstrip('.')}. Fix: {fix}" if fix else text)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments are lost by the default pickling, and workers send errors to the main process.
        return (_rebuild, (type(self), self.what, self.where, self.fix))


class StoppedError(HbaError):
    """A signal asked the command to stop; what it has done is kept, and the same command goes on (exit code 75).

    75 is EX_TEMPFAIL of sysexits: nothing is wrong, try again.
    """

    exit_code = 75


class MachineError(HbaError):
    """The machine is short of something, or a disk, file server or hub that it reads from is away (exit code 1).

    No fault of the data: no sample is left out for it.
    """


class InputError(HbaError):
    """The user's data, configuration or call is wrong (exit code 2)."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration key or value is wrong."""


class TaxonomyError(InputError):
    """A dataset, task or label is not in the taxonomy."""


class MediaError(InputError):
    """One medium of one sample cannot be read; its sample goes into quarantine."""


class NoSoundTrackError(MediaError):
    """A clip is silent because nothing was recorded: it is whole, and has no sound to be read."""


def _rebuild(kind: type[HbaError], what: str, where: str, fix: str) -> HbaError:
    return kind(what, where=where, fix=fix)


def nearest(word: str, known: Iterable[str], *, prefix: str = "") -> str:
    """A fix: what to write in place of `word`, the nearest of the `known` names (or the only one that it begins) first.

    `prefix` stands in front of each name that is shown and takes no part in the comparison.
    """
    names = sorted(known)
    begun = [name for name in names if word and name.startswith(word)]
    close = get_close_matches(word, names, n=1) or (begun if len(begun) == 1 else [])
    hint = f"Did you mean {prefix + close[0]!r}? " if close else ""
    if len(names) < 2:
        return f"{hint}Write {prefix + names[0]!r}." if names else "Leave it out: there is none."
    return f"{hint}Choose one of: {', '.join(prefix + name for name in names)}."

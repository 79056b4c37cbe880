"""The one exception that the command line turns into one line and exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user asked for can't be done; the text says why and what could."""

    exit_code = 2  # the command line's


def nearest(kind: str, name: str, known: Iterable[str], limit: int = 3) -> UserError:
    """`there is no method 'simclrr'; did you mean simclr?`, or the whole list where nothing is near."""
    known = list(known)
    plain = name.strip().lower()
    near = [one for one in known if one == plain] or difflib.get_close_matches(plain, known, n=limit, cutoff=0.5)
    if not near and plain:
        near = [one for one in known if plain in one][:limit]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif not known:
        hint = "there are none"
    elif len(known) <= 30:
        hint = f"there are {', '.join(known)}"
    else:
        hint = f"{len(known)} others are known"
    return UserError(f"there is no {kind} {name!r}; {hint}")


def first_line(said: object) -> str:
    """The first line of a text, or of what an error says; how it would be written in code where that is nothing."""
    return str(said).strip().partition("\n")[0] or repr(said)


class ResourceError(UserError, RuntimeError):
    """Memory, shared memory or a worker process ran out; the text says what to try. `__cause__` is what was raised."""


class DivergedError(UserError):
    """The weights of a run aren't finite any more; the text says which checkpoint is, and how to go on from it."""


class TimedOutError(ResourceError):
    """Other ranks didn't come; the text says at which step, which ranks, and which checkpoint there is."""

    exit_code = 1


class ToldElsewhereError(UserError):
    """Another rank says what is wrong; this one ends with it and prints nothing."""

    def __init__(self, text: str = "", exit_code: int = 2):
        super().__init__(text)
        self.exit_code = exit_code

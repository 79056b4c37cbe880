"""The one exception that the command line turns into one line and exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What the user asked for can't be done; the text says why and what could."""


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

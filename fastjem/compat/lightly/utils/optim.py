"""`lightly.utils.optim`: the settings of an optimiser's groups by their names."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from fastjem.functional import checks


def update_param_groups(
    optimizer: Optimizer,
    default_update: dict[str, Any] | None = None,
    updates: Iterable[dict[str, Any]] | None = None,
) -> None:
    """Set options of an optimiser's groups of parameters, in place.

    Args:
        default_update: of every group that has these options.
        updates: of the groups of a "name" each, which must have the options; these come after the defaults.

    Raises:
        ValueError: for a name or an option that no group has; then nothing has been changed.
    """
    updates = list(updates or [])
    changes: list[tuple[dict[str, Any], str, Any]] = [
        (group, key, value)
        for group in optimizer.param_groups
        for key, value in (default_update or {}).items()
        if key in group
    ]
    for update in updates:
        groups = [group for group in optimizer.param_groups if group.get("name") == update["name"]]
        if not groups:
            names = [group.get("name") for group in optimizer.param_groups]
            checks.fail("update_param_groups", f"a group must be named {update['name']!r}", names)
        for group in groups:
            if missing := [key for key in update if key not in group]:
                contract = f"the group {update['name']!r} must have the option {missing[0]!r}"
                checks.fail("update_param_groups", contract, sorted(group.keys() - {"params"}))
            changes += [(group, key, value) for key, value in update.items()]
    for group, key, value in changes:
        group[key] = value

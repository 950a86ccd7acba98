"""Names that options had in the release before: they go on for this one."""

from typing import Any

from litgpt_akl.config.distillation import KEYWORDS
from litgpt_akl.messages import UserError

_ALWAYS_GROUPED = ("tad.weighting", "csd.weight", "drkl.gamma")
_RENAMED = {new: old for new, old in KEYWORDS.items() if new not in _ALWAYS_GROUPED}
OLD_NAMES = {old: [new for new in _RENAMED if _RENAMED[new] == old] for old in _RENAMED.values()}
"""Members of ``distill``, and where they are now; of two the divergence decides."""


def new_name(old: str, divergence: str | None) -> str:
    """The member of ``distill`` that ``old`` was; raises UserError if the divergence, None if unknown, has no such."""
    new = OLD_NAMES[old]
    own = [name for name in new if name.partition(".")[0] == divergence]
    if len(new) > 1 and not own:
        places = " or ".join(f"--distill.{name}" for name in new)
        raise UserError(
            f"--distill.{old} is the old name of {places}, and --distill.divergence {divergence or 'is not given'}"
            f"{'' if divergence is None else ' takes neither'}.\nGive the one that is meant, with its divergence."
        )
    return (own or new)[0]


def two_values(old: str, value: Any, new: str, other: Any) -> UserError:
    """What a user is told who gives an option twice, under both of its names."""
    return UserError(
        f"--distill.{old} {value} and --distill.{new} {other} are one option, under its old name and its new one.\n"
        f"Leave --distill.{old} out."
    )


def with_new_names(settings: Any) -> tuple[Any, dict[str, str]]:
    """A recipe under the options' names of today, and which names of ``distill`` that has changed.

    Raises:
        UserError: an option has two values, or the divergence does not say which one is meant.
    """
    distill = settings.get("distill") if isinstance(settings, dict) else None
    if not isinstance(distill, dict) or OLD_NAMES.keys().isdisjoint(distill):
        return settings, {}
    translated, found = {name: value for name, value in distill.items() if name not in OLD_NAMES}, {}
    for old in filter(OLD_NAMES.__contains__, distill):
        value = distill[old]
        if value is None:
            # the default of an option that two divergences had
            continue
        found[old] = new = new_name(old, distill.get("divergence"))
        group, _, name = new.partition(".")
        members = translated[group] = dict(translated.get(group) or {})
        if members.setdefault(name, value) != value:
            raise two_values(old, value, new, members[name])
    return {**settings, "distill": translated}, found

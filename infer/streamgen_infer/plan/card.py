"""What a model's card allows."""

from __future__ import annotations

from collections.abc import Sequence

from streamgen.errors import UserError
from streamgen.grid import Visibility
from streamgen.schedules import SCHEDULES, schedule


def choose_visibility(
    name: str, listed: Sequence[str], *, model: str, wanted: str | None = None, force: bool = False
) -> Visibility:
    """The visibility under which a model is streamed with a schedule: the wanted one, or the first that both know.

    listed: the card's `visibility`. UserError for a schedule or visibility that the model was not trained for, unless
    forced; forced without a wish, it is the schedule's usual one. A schedule that cannot run what is wanted is refused
    in any case.
    """
    able = schedule(name).visibilities
    if wanted is not None and wanted not in able:
        raise UserError(f"schedule {name} cannot run visibility {wanted}; it runs: {', '.join(able)}")
    trained = [one for one in able if one in listed and wanted in (None, one)]
    if trained:
        return trained[0]
    usual = next(one for one in able if wanted in (None, one))
    if force:
        return usual
    fitting = [other for other, row in SCHEDULES.items() if set(row.visibilities) & set(listed)]
    needs = f"visibility {wanted}" if wanted else f"one of the visibilities {', '.join(able)}"
    raise UserError(
        f"schedule {name} needs {needs}, and the card of {model} lists {', '.join(listed)}: it was not trained for "
        f"that; it was for: {', '.join(fitting)}. --force takes {usual} all the same, and quality will suffer"
    )

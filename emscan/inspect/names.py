"""The names that a pickle would import, which of them are refused, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from emscan.inspect.document import PickleInfo, Refused
from emscan.inspect.lenient import BUILT, CALLED, LenientMachine
from emscan.load.calls import CALLS
from emscan.load.pickles import Machine, known

_UNKNOWN = "it is not on the safe list"


def pickle_info(
    strict: Machine | None,
    lenient: LenientMachine | None,
    names: Iterable[str] = (),
    refusal: str = "",
    safe: Callable[[str], bool] = known,
) -> PickleInfo:
    """Return every name that a pickle imports: of the machines that ran, and ``names``.

    ``lenient`` says how each is used, if it ran; ``refusal``: why the strict machine refused; ``safe``: what may be
    named.
    """
    found = dict.fromkeys([*(strict.names if strict else ()), *(lenient.names if lenient else ()), *names])
    uses = lenient.uses if lenient is not None else {}
    refused = [Refused(name, _reason(uses.get(name, set()))) for name in found if not safe(name)]
    if refusal and strict is None:  # a name that is safe to hold may still be called
        called = [name for name in found if safe(name) and CALLED in uses.get(name, set()) and name not in CALLS]
        refused += [Refused(name, "it would be called, which loading a model never needs") for name in called]
    return PickleInfo(list(found), refused)


def _reason(uses: set[str]) -> str:
    if CALLED in uses:
        return f"{_UNKNOWN}, and it would be called"
    if BUILT in uses:
        return f"{_UNKNOWN}, and an object of it would be built"
    return _UNKNOWN

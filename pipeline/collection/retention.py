"""Which runs of a store are kept. What they use is `infra/artifacts/announcements.py`, what removes the rest
`infra/artifacts/gc.py`."""

from collections.abc import Mapping
from dataclasses import dataclass

from infra.artifacts.announcements import Keep
from infra.artifacts.gc_plan import MIN_AGE_S
from infra.registry.roots import RunState

DAY_S = 24 * 3600.0
ABANDONED_S = 3 * DAY_S
"""A run that MLflow calls running has ended, its driver killed, if it announced nothing for so long: a living one does
every ten minutes, also during an outage of the store that is shorter than this."""


@dataclass(frozen=True)
class Rule:
    """Which runs are kept. ``keep_days``: those that ended within; None: all that are not deleted."""

    keep_days: float | None = None
    min_age_s: float = MIN_AGE_S
    forget_unknown: bool = False
    """Whether runs that MLflow does not know go too."""

    def keep(self, runs: Mapping[str, RunState], now: float) -> Keep:
        """The rule for runs in these states. ``now``: seconds since the epoch.

        A run in progress is always kept: one that MLflow did not know when it was asked counts as such for 24 h, one
        that was deleted before its end for the minimal age, from when it announced something. An `abandoned` one
        ended when it last did.
        """

        def keep(run: str, announced_s: float) -> bool:
            state = runs.get(run)
            if state is None:
                return not self.forget_unknown or announced_s < MIN_AGE_S
            if state.deleted:
                return state.running and announced_s < self.min_age_s
            if self.keep_days is None or (state.running and not abandoned(state, announced_s, now)):
                return True
            return _quiet_s(state, announced_s, now) < self.keep_days * DAY_S

        return keep


def abandoned(state: RunState, announced_s: float, now: float) -> bool:
    """Whether a run that MLflow calls running has not been heard of for so long that it must have ended.

    ``announced_s``: seconds since it announced something. ``now``: seconds since the epoch.
    """
    return state.running and _quiet_s(state, announced_s, now) >= ABANDONED_S


def _quiet_s(state: RunState, announced_s: float, now: float) -> float:
    """Seconds since a run ended; of one that never said so, since it was last heard of."""
    return min(announced_s, now - state.last) if state.running else now - state.last

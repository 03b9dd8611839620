"""Which tick of a cron schedule is due, and what follows from it: pure functions of time, state and Ray's job list.

A *tick* is one time at which a cron expression fires, in UTC. Expressions are read by CronSim, which follows Debian's
cron (day of month and of week, daylight saving time) and counts Sunday as 0. ``advance`` is the whole behaviour of a
schedule; it is called again and again, by ``infra.schedule.scheduler``, with the state that it returned before. Covers
five-field expressions with minutes as the smallest step. Does not cover nicknames (@daily) and seconds.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from infra.errors import ConfigError

ACTIVE = frozenset({"PENDING", "RUNNING"})
TOO_LATE = "no scheduler or no Ray cluster was there in time"
SUBMISSIONS = 3  # of one tick, when Ray lost the job each time
DELIVERIES = 5  # attempts to deliver one notice
_DELIVERY_BACKOFF = timedelta(seconds=30)  # doubles with every attempt
_TICK = "%Y%m%dT%H%MZ"


class Cron:
    """A cron expression in a time zone. Raises ConfigError if it is malformed or never fires."""

    def __init__(self, expression: str, timezone: str = "UTC") -> None:
        self.expression = expression
        self.timezone = timezone
        try:
            self._zone = ZoneInfo(timezone)
        except (KeyError, ValueError, OSError) as error:
            raise ConfigError(
                f"time zone {timezone!r} is unknown; accepted: names like UTC or Europe/Berlin"
            ) from error
        try:
            if len(expression.split()) != 5:
                raise CronSimError("five fields are needed")
            self.next(datetime.now(UTC))
        except CronSimError as error:
            raise ConfigError(
                f"cron expression {expression!r}: {error}; "
                "accepted: minute hour day-of-month month day-of-week, for example '0 2 * * *'"
            ) from error
        except StopIteration:
            raise ConfigError(f"cron expression {expression!r} does not fire within 50 years") from None

    def next(self, moment: datetime) -> datetime:
        """The first tick after ``moment``, in UTC."""
        return next(CronSim(self.expression, moment.astimezone(self._zone))).astimezone(UTC)

    def latest(self, moment: datetime) -> datetime | None:
        """The last tick at or before ``moment``, in UTC; None if there was none in the 50 years before."""
        after = moment + timedelta(seconds=1)  # CronSim starts beside the moment that it is given
        try:
            tick = next(CronSim(self.expression, after.astimezone(self._zone), reverse=True)).astimezone(UTC)
        except StopIteration:
            return None
        # In the hour that a clock passes twice, CronSim's backward search stops a tick early.
        while (following := self.next(tick)) <= moment:
            tick = following
        return tick


@dataclass(frozen=True)
class Due:
    """The latest tick that nothing was decided about; ``expired``: it is longer ago than the grace time."""

    tick: datetime
    expired: bool


def due(now: datetime, last: datetime, cron: Cron, grace: timedelta) -> Due | None:
    """The latest tick in (last, now], or None. Older ticks in that range collapse into it.

    ``last`` is the tick that was decided about last. A clock that was set back makes nothing due.
    """
    tick = cron.latest(now)
    if tick is None or tick <= last:
        return None
    return Due(tick, expired=now - tick > grace)


def ahead(now: datetime, last: datetime, cron: Cron) -> bool:
    """Whether ``last`` lies after the next tick: decided about while some clock was far ahead.

    Nothing would be due until then. Clocks of several machines that differ by less than a period are left alone.
    """
    return last > now and last > cron.next(now)


# -- names -------------------------------------------------------------------------------------------------------


def submission_id(suite: str, tick: datetime) -> str:
    """The id of a tick's submission: the same for everyone who computes it, and refused by Ray the second time."""
    return f"retrain-{suite}-{tick.astimezone(UTC).strftime(_TICK)}"


def tick_of(suite: str, submission: str) -> datetime | None:
    """The inverse of ``submission_id``; None for ids of other schedules."""
    found = re.fullmatch(rf"retrain-{re.escape(suite)}-(\d{{8}}T\d{{4}}Z)", submission)
    try:
        return datetime.strptime(found[1], _TICK).replace(tzinfo=UTC) if found else None
    except ValueError:
        return None


# -- state -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What Ray says of one submission: its status and, when it ended, the exit status of its entrypoint."""

    status: str
    exit_code: int | None = None
    message: str = ""
    started: datetime | None = None


@dataclass(frozen=True)
class Watched:
    """The submission whose outcome is awaited, and how often it was submitted."""

    tick: datetime
    submissions: int = 1


@dataclass(frozen=True)
class Notice:
    """Something to tell: ``status`` is Ray's, or SKIPPED (the one before still ran), MISSED (too late), LOST, or CLOCK
    (the tick is in the future: a clock was ahead)."""

    tick: datetime
    status: str
    exit_code: int | None = None
    message: str = ""
    deliveries: int = 0
    not_before: datetime | None = None

    def claimed(self, now: datetime) -> "Notice":
        """The notice with one delivery more, and the time before which nobody tries again."""
        return replace(self, deliveries=self.deliveries + 1, not_before=now + _DELIVERY_BACKOFF * 2**self.deliveries)


@dataclass(frozen=True)
class State:
    """What a schedule must remember: the last tick decided about, the awaited submission, undelivered notices."""

    last: datetime
    watched: Watched | None = None
    notices: tuple[Notice, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; times as ISO 8601 text."""

        def plain(value: Any) -> Any:
            if isinstance(value, datetime):
                return value.isoformat()
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple | list) else value

        return {"format": 1, **plain(asdict(self))}

    @classmethod
    def from_dict(cls, body: dict[str, Any]) -> "State":
        """The inverse of ``to_dict``. Raises ConfigError for anything else."""
        try:
            if body["format"] != 1:
                raise ValueError(f"format {body['format']!r}, accepted: 1")

            def times(item: dict[str, Any]) -> dict[str, Any]:
                read = {name: item[name] for name in ("tick", "not_before") if item.get(name) is not None}
                return {**item, **{name: datetime.fromisoformat(value) for name, value in read.items()}}

            return cls(
                datetime.fromisoformat(body["last"]),
                Watched(**times(body["watched"])) if body["watched"] else None,
                tuple(Notice(**times(notice)) for notice in body["notices"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"the schedule's state is unreadable: {error}") from error


def first_state(now: datetime, jobs: Mapping[datetime, Job]) -> State:
    """The state of a schedule that has none stored: what Ray remembers counts; of the past nothing else is due."""
    last = max(jobs, default=now)
    active = [tick for tick, job in jobs.items() if job.status in ACTIVE]
    return State(last, Watched(max(active)) if active else None)


# -- decisions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Submit the tick ``submit`` (None: nothing). ``state`` holds once that is done, ``otherwise`` if it failed."""

    state: State
    otherwise: State
    submit: datetime | None = None


def advance(
    state: State, now: datetime, cron: Cron, grace: timedelta, jobs: Mapping[datetime, Job], trouble: str = ""
) -> Decision:
    """What a schedule does now.

    ``jobs`` are this schedule's submissions that Ray knows, by tick. A submission that Ray no longer knows (its head
    was restarted) is submitted again while it is within the grace time, at most ``SUBMISSIONS`` times: a run goes on
    where the lost one was. A tick that falls due while a submission is active is skipped; of several missed ticks the
    latest is run; one longer ago than ``grace`` is not run. A last tick far in the future is told and becomes now: the
    schedule goes on with the next tick. ``trouble``: what went wrong until now, for the notice of a missed tick.
    """
    last, watched, notices, again = state.last, state.watched, list(state.notices), None
    if ahead(now, last, cron):
        text = f"decided about by a clock that was ahead of {now.isoformat()}; next tick {cron.next(now).isoformat()}"
        notices.append(Notice(last, "CLOCK", message=text))
        last = now
    if watched is not None and watched.tick not in jobs:
        if now - watched.tick <= grace and watched.submissions < SUBMISSIONS:
            again = replace(watched, submissions=watched.submissions + 1)
        else:
            notices.append(Notice(watched.tick, "LOST", message="Ray does not know this submission any more"))
            watched = None
    # Those after the last tick are of a scheduler that was killed before it wrote down what it had submitted.
    unsaved = sorted(tick for tick in jobs if last < tick <= now)
    if again is not None and unsaved:
        again = watched = None  # they stand for the lost one
    for tick in [watched.tick, *unsaved] if watched and watched.tick in jobs else unsaved:
        job = jobs[tick]
        if job.status not in ACTIVE:
            notices.append(Notice(tick, job.status, job.exit_code, job.message))
            watched = None if watched and watched.tick == tick else watched
        elif watched is None or watched.tick != tick:
            watched = Watched(tick)
    last = max([last, *unsaved])
    seen, submit = State(last, watched, tuple(notices)), None
    active = [tick for tick, job in jobs.items() if job.status in ACTIVE]
    if again is not None and not active:
        submit, watched = again.tick, again
    found = due(now, last, cron, grace)
    if found is not None:
        last = found.tick
        if found.expired:
            notices.append(_missed(last, trouble))
        elif active:
            text = f"the submission of {max(active).isoformat()} is still active"
            notices.append(Notice(last, "SKIPPED", message=text))
        else:  # also in place of a lost submission: the latest tick stands for those before it
            submit, watched = last, Watched(last)
    if watched is None and active:  # submitted by a scheduler that stood in for this one, and saved nothing
        watched = Watched(max(active))
    decided = State(last, watched, tuple(notices))
    return Decision(decided, seen if submit else decided, submit)


def given_up(state: State, now: datetime, cron: Cron, grace: timedelta, trouble: str) -> State:
    """What is decided while Ray cannot be asked: the latest tick whose grace time is over was missed."""
    tick = cron.latest(now - grace)
    if tick is None or tick <= state.last:
        return state
    return replace(state, last=tick, notices=(*state.notices, _missed(tick, trouble)))


def _missed(tick: datetime, trouble: str) -> Notice:
    return Notice(tick, "MISSED", message=f"{TOO_LATE}: {trouble}" if trouble else TOO_LATE)


def overdue(state: State, now: datetime, jobs: Mapping[datetime, Job], limit: timedelta) -> datetime | None:
    """The awaited submission, if it has run for longer than ``limit``."""
    job = jobs.get(state.watched.tick) if state.watched else None
    if job is None or job.status not in ACTIVE or job.started is None or now - job.started <= limit:
        return None
    assert state.watched is not None
    return state.watched.tick

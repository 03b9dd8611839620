import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from infra.errors import ConfigError
from infra.schedule.ticks import (
    ACTIVE,
    SUBMISSIONS,
    Cron,
    Job,
    Notice,
    State,
    Watched,
    advance,
    ahead,
    due,
    first_state,
    given_up,
    submission_id,
    tick_of,
)

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)
START = datetime(2026, 3, 1, tzinfo=UTC)
EXPRESSIONS = ["0 2 * * *", "*/15 * * * *", "30 1 * * *", "30 2 1,15 * *", "0 */6 * * 1-5", "5 4 * * SUN", "* * * * *"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York"]

crons = st.builds(Cron, st.sampled_from(EXPRESSIONS), st.sampled_from(ZONES))
moments = st.integers(0, 400 * 86400).map(lambda seconds: START + timedelta(seconds=seconds))
spans = st.integers(0, 60 * 86400).map(lambda seconds: timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("expression", "timezone", "message"),
    [
        ("0 2 * *", "UTC", "five fields"),
        ("0 2 * * * *", "UTC", "five fields"),
        ("61 2 * * *", "UTC", "minute"),
        ("@daily", "UTC", "five fields"),
        ("0 0 31 2 *", "UTC", "day"),
        ("0 2 * * *", "Europe/Nowhere", "time zone"),
        ("0 2 * * *", "../etc/passwd", "time zone"),
    ],
)
def test_bad_expressions_are_refused(expression: str, timezone: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Cron(expression, timezone)


def test_weekdays_are_counted_as_cron_counts_them() -> None:
    monday = Cron("0 2 * * 1").next(START)
    assert monday.strftime("%A") == "Monday"
    assert Cron("0 2 * * 0").next(START) == Cron("0 2 * * 7").next(START) == Cron("0 2 * * SUN").next(START)


@given(crons, moments)
def test_latest_is_the_last_tick_of_the_forward_sequence(cron: Cron, moment: datetime) -> None:
    latest = cron.latest(moment)
    assert latest is not None
    assert latest <= moment < cron.next(latest)
    assert cron.latest(latest) == latest
    assert cron.latest(latest - timedelta(seconds=1)) != latest


@pytest.mark.parametrize("expression", ["30 1 * * *", "30 2 * * *", "*/20 * * * *", "10 */2 * * *"])
@pytest.mark.parametrize("night", [datetime(2026, 3, 29, tzinfo=UTC), datetime(2026, 10, 25, tzinfo=UTC)])
def test_every_tick_is_seen_once_when_clocks_change(expression: str, night: datetime) -> None:
    cron = Cron(expression, "Europe/Berlin")
    ticks, tick = [], cron.next(night - 6 * HOUR)
    while tick <= night + 6 * HOUR:
        ticks.append(tick)
        tick = cron.next(tick)
    seen, last, minute = [], night - 6 * HOUR, night - 6 * HOUR
    while minute <= night + 6 * HOUR:
        found = due(minute, last, cron, HOUR)
        if found is not None:
            seen.append(found.tick)
            last = found.tick
        minute += MINUTE
    assert seen == ticks
    if "*/20" not in expression and "*/2" not in expression:
        assert len(ticks) == 1  # neither skipped in the missing hour nor run twice in the repeated one


@given(crons, moments, spans, spans)
def test_due(cron: Cron, last: datetime, gone: timedelta, grace: timedelta) -> None:
    now = last + gone
    found = due(now, last, cron, grace)
    if found is None:
        assert cron.next(last) > now
        return
    assert last < found.tick <= now < cron.next(found.tick)
    assert found.expired == (now - found.tick > grace)
    assert due(now, found.tick, cron, grace) is None
    assert due(now - gone - HOUR, now, cron, grace) is None  # the clock was set back


@given(crons, moments, st.lists(spans, max_size=20))
def test_polled_at_any_moments_no_tick_comes_twice(cron: Cron, start: datetime, waits: list[timedelta]) -> None:
    last = now = start
    for wait in waits:
        now += wait
        found = due(now, last, cron, 365 * 24 * HOUR)
        assert found is None or found.tick > last
        last = found.tick if found else last
    assert cron.next(last) > now or now == start


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]*", fullmatch=True), moments)
def test_ids_name_their_tick_and_schedule(suite: str, moment: datetime) -> None:
    tick = moment.replace(second=0)
    name = submission_id(suite, tick)
    assert tick_of(suite, name) == tick
    assert tick_of(f"{suite}-b", name) is None
    assert tick_of(suite, submission_id(f"{suite}-b", tick)) is None
    assert tick_of(suite, f"retrain-{suite}-20269999T9999Z") is None


def test_state_survives_json() -> None:
    notice = Notice(START, "FAILED", 1, "words").claimed(START)
    for state in (State(START), State(START, Watched(START, 2), (notice, Notice(START, "SKIPPED")))):
        assert State.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    for body in ({}, {"format": 2}, {**State(START).to_dict(), "last": "yesterday"}, {"format": 1, "last": 3}):
        with pytest.raises(ConfigError, match="unreadable"):
            State.from_dict(body)


def test_first_state_goes_by_what_ray_knows() -> None:
    assert first_state(START, {}) == State(START)
    jobs = {START - 2 * HOUR: Job("SUCCEEDED", 0), START - HOUR: Job("RUNNING")}
    assert first_state(START, jobs) == State(START - HOUR, Watched(START - HOUR))


DAILY, GRACE = Cron("0 2 * * *"), 12 * HOUR
NIGHT = START + 2 * HOUR


def test_an_expired_tick_is_told_and_not_run() -> None:
    decision = advance(State(START), NIGHT + 13 * HOUR, DAILY, GRACE, {})
    assert decision.submit is None
    assert [(n.tick, n.status) for n in decision.state.notices] == [(NIGHT, "MISSED")]


def test_an_outage_is_told_tick_by_tick_however_close_they_are() -> None:
    hourly, state = Cron("0 * * * *"), State(START)
    for hours in range(1, 49):
        state = given_up(state, START + hours * HOUR, hourly, GRACE, "no route to Ray")
    assert [notice.tick for notice in state.notices] == [START + hours * HOUR for hours in range(1, 37)]
    assert {(notice.status, notice.message) for notice in state.notices} == {
        ("MISSED", "no scheduler or no Ray cluster was there in time: no route to Ray")
    }
    back = advance(state, START + 48 * HOUR, hourly, GRACE, {})
    assert back.submit == START + 48 * HOUR


def test_a_missed_tick_says_what_was_in_its_way() -> None:
    decision = advance(State(START), NIGHT + 13 * HOUR, DAILY, GRACE, {}, "Ray could not take it: too large")
    assert decision.state.notices[0].message.endswith("in time: Ray could not take it: too large")


def test_a_run_that_another_scheduler_submitted_and_did_not_write_down_is_watched() -> None:
    """It decided with an older state, and failed to save."""
    jobs = {NIGHT: Job("RUNNING")}
    decision = advance(State(NIGHT), NIGHT + HOUR, DAILY, GRACE, jobs)
    assert (decision.submit, decision.state.watched) == (None, Watched(NIGHT))
    ended = advance(decision.state, NIGHT + 2 * HOUR, DAILY, GRACE, {NIGHT: Job("FAILED", 1)})
    assert [(notice.tick, notice.status) for notice in ended.state.notices] == [(NIGHT, "FAILED")]


def test_a_lost_submission_is_submitted_again_a_bounded_number_of_times() -> None:
    state = State(NIGHT, Watched(NIGHT))
    for number in range(2, SUBMISSIONS + 1):
        decision = advance(state, NIGHT + HOUR, DAILY, GRACE, {})
        assert decision.submit == NIGHT
        assert decision.otherwise == state  # if that failed, nothing has changed
        state = decision.state
        assert state.watched == Watched(NIGHT, number)
    decision = advance(state, NIGHT + HOUR, DAILY, GRACE, {})
    assert (decision.submit, decision.state.watched) == (None, None)
    assert [n.status for n in decision.state.notices] == ["LOST"]


def test_a_lost_submission_is_not_run_after_a_later_one() -> None:
    # The head lost the first; the second was submitted by a scheduler that was killed before it wrote that down.
    jobs = {NIGHT + 24 * HOUR: Job("SUCCEEDED", 0)}
    decision = advance(State(NIGHT, Watched(NIGHT)), NIGHT + 25 * HOUR, DAILY, 48 * HOUR, jobs)
    assert decision.submit is None
    assert decision.state == State(NIGHT + 24 * HOUR, None, (Notice(NIGHT + 24 * HOUR, "SUCCEEDED", 0),))


def test_an_outcome_is_told_even_if_the_next_submission_fails() -> None:
    jobs = {NIGHT: Job("FAILED", 1, "no")}
    decision = advance(State(NIGHT, Watched(NIGHT)), NIGHT + 24 * HOUR, DAILY, GRACE, jobs)
    assert decision.submit == NIGHT + 24 * HOUR
    assert decision.otherwise.notices == decision.state.notices == (Notice(NIGHT, "FAILED", 1, "no"),)
    assert decision.otherwise.last == NIGHT  # so the tick stays due


def test_a_last_tick_far_in_the_future_is_told_once_and_dropped() -> None:
    future = NIGHT + 1000 * 24 * HOUR
    now = START + HOUR
    decision = advance(State(future), now, DAILY, GRACE, {future: Job("SUCCEEDED", 0)})
    assert decision.submit is None
    assert [(n.tick, n.status) for n in decision.state.notices] == [(future, "CLOCK")]
    assert not ahead(now, decision.state.last, DAILY)
    assert advance(decision.state, now, DAILY, GRACE, {}).state == decision.state
    assert advance(decision.state, NIGHT, DAILY, GRACE, {}).submit == NIGHT


@given(crons, moments, spans)
def test_clocks_that_differ_by_less_than_a_period_are_left_alone(cron: Cron, now: datetime, gone: timedelta) -> None:
    assert not ahead(now, now - gone, cron)
    assert not ahead(now, cron.next(now), cron)
    assert ahead(now, cron.next(cron.next(now)), cron)


@dataclass
class Head:
    """A Ray head, as far as a schedule sees it."""

    jobs: dict[datetime, Job] = field(default_factory=dict)

    def submit(self, tick: datetime) -> None:
        assert tick not in self.jobs or self.jobs[tick].status  # a reused id is refused
        self.jobs.setdefault(tick, Job("PENDING"))


class Life(RuleBasedStateMachine):
    """A schedule among kills, outages, lost heads and jobs of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.cron, self.grace = Cron("*/15 * * * *"), 2 * HOUR
        self.now = START + 7 * MINUTE
        self.head, self.heads = Head(), 0
        self.saved: State | None = None
        self.submitted: list[tuple[int, datetime]] = []
        self.told: list[tuple[datetime, str]] = []
        self.ended: set[tuple[datetime, str]] = set()

    def _decide(self) -> None:
        self.saved = self.saved or first_state(self.now, self.head.jobs)

    @rule(killed=st.sampled_from(["", "before the submission", "before the state was saved"]))
    def step(self, killed: str) -> None:
        self._decide()
        assert self.saved is not None
        decision = advance(self.saved, self.now, self.cron, self.grace, self.head.jobs)
        if decision.submit is not None:
            assert self.now - decision.submit <= self.grace
            assert not [job for job in self.head.jobs.values() if job.status in ACTIVE], "overlap"
            if killed == "before the submission":
                return
            assert decision.submit not in self.head.jobs
            self.head.submit(decision.submit)
            self.submitted.append((self.heads, decision.submit))
        if not killed:
            new = decision.state.notices
            self.told += [(notice.tick, notice.status) for notice in new]
            self.saved = State(decision.state.last, decision.state.watched)

    @rule(wait=st.sampled_from([MINUTE, 10 * MINUTE, 20 * MINUTE, HOUR, 5 * HOUR]))
    def time_passes(self, wait: timedelta) -> None:
        self.now += wait

    @precondition(lambda self: any(job.status in ACTIVE for job in self.head.jobs.values()))
    @rule(status=st.sampled_from(["RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]))
    def job_moves_on(self, status: str) -> None:
        tick = next(tick for tick, job in self.head.jobs.items() if job.status in ACTIVE)
        self.head.jobs[tick] = Job(status)
        if status not in ACTIVE:
            self.ended.add((tick, status))

    @rule()
    def head_restarts(self) -> None:
        self.ended -= {(tick, job.status) for tick, job in self.head.jobs.items()} - set(self.told)
        self.head, self.heads = Head(), self.heads + 1

    @invariant()
    def no_tick_runs_twice_on_one_head(self) -> None:
        assert len(set(self.submitted)) == len(self.submitted)
        ticks = [tick for _, tick in self.submitted]
        assert ticks == sorted(ticks)
        assert all(ticks.count(tick) <= SUBMISSIONS + self.heads for tick in ticks)

    def teardown(self) -> None:
        if self.saved is None:
            return
        for _ in range(3):  # left in peace, the schedule reports all that ended and runs what is still worth it
            self.step("")
            for tick, job in self.head.jobs.items():
                if job.status in ACTIVE:
                    self.head.jobs[tick] = Job("SUCCEEDED")
                    self.ended.add((tick, "SUCCEEDED"))
        self.step("")
        assert self.ended <= set(self.told)
        assert len(set(self.told)) == len(self.told), "told twice"
        assert self.saved.watched is None
        latest = self.cron.latest(self.now)
        assert latest is not None
        assert self.saved.last >= latest or latest <= START + 7 * MINUTE


Life.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase

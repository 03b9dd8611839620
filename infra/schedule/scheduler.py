"""Retraining on a schedule, on one machine: every tick of a cron expression submits the main job to Ray.

    python -m pipeline schedule --cron "0 2 * * *" --config pipeline/configs/quickstart.yaml [section.field=value …]

The submission's id is a function of suite and tick, and Ray refuses an id that it has: no tick is submitted twice.
``infra.schedule.ticks`` decides; what it must remember between two calls is one small object in the store, replaced
only by whoever read it last, so a scheduler may be killed at any point, and several for one suite stand in for each
other. What is running when a scheduler ends keeps running, and the next scheduler reports its outcome.

Covers outcomes (log and webhook), overlap, missed ticks, a lost Ray head, runs that do not end. Does not cover
starting the scheduler itself (systemd, or ``nohup``), nor Kubernetes (``infra/kubernetes``), where a CronJob takes
this place.

Exit status: 0 ended by SIGTERM or SIGINT; 2 bad input.
"""

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import requests
from ray.job_submission import JobSubmissionClient

from infra.ending import message
from infra.environment import job_variables
from infra.errors import ConfigError, FactoryError
from infra.schedule import webhook
from infra.schedule.job import ROOT, check_reachable, job_entrypoint, read_scheduled
from infra.schedule.ticks import (
    DELIVERIES,
    Cron,
    Job,
    Notice,
    State,
    advance,
    ahead,
    due,
    first_state,
    given_up,
    overdue,
    submission_id,
    tick_of,
)
from infra.store.layout import schedule_name
from infra.store.s3 import Store

_POLL = 15.0  # seconds; short, because a wait does not count the time for which the machine sleeps
_REQUEST_SECONDS = 60.0
_LOG = logging.getLogger("infra.schedule.scheduler")


class JobApiError(FactoryError):
    """Ray's job API is unreachable, or refused what was asked."""


class Clock(Protocol):
    """Time, as the scheduler sees it."""

    def now(self) -> datetime:
        """The present moment, in UTC."""

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; True once the scheduler is to end."""


class Jobs(Protocol):
    """The submissions of one schedule."""

    def list(self) -> Mapping[datetime, Job]:
        """Those that Ray knows, by tick. Raises JobApiError."""

    def submit(self, tick: datetime) -> bool:
        """Submit a tick; False if Ray has a submission of that id already. Raises JobApiError."""

    def stop(self, tick: datetime) -> None:
        """Ask Ray to end a submission, which may take a while. Raises JobApiError."""


class SystemClock:
    """The machine's clock; ``stop`` ends waits."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def now(self) -> datetime:
        """See Clock."""
        return datetime.now(UTC)

    def wait(self, seconds: float) -> bool:
        """See Clock."""
        return self._stop.wait(seconds)


class _Client(JobSubmissionClient):
    """Ray's client, with a limit for the time that a request may hang; Ray's own has none."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": _REQUEST_SECONDS, **options})


class RayJobs:
    """Submissions through Ray's job API: `entrypoint` in a copy of ``working_dir`` (less what .rayignore names)."""

    def __init__(self, address: str, suite: str, entrypoint: str, working_dir: Path = ROOT) -> None:
        self._address = address
        self._suite = suite
        self._entrypoint = entrypoint
        self._working_dir = working_dir

    def list(self) -> Mapping[datetime, Job]:
        """See Jobs."""
        try:
            details = self._client().list_jobs()
        except Exception as error:  # Ray's client raises what it pleases
            raise self._failed("list its jobs", error) from error
        jobs = {}
        for detail in details:
            tick = tick_of(self._suite, detail.submission_id or "")
            if tick is not None:
                started = datetime.fromtimestamp(detail.start_time / 1000, UTC) if detail.start_time else None
                jobs[tick] = Job(str(detail.status), detail.driver_exit_code, (detail.message or "")[-500:], started)
        return jobs

    def submit(self, tick: datetime) -> bool:
        """See Jobs."""
        name = submission_id(self._suite, tick)
        try:
            self._client().submit_job(
                entrypoint=self._entrypoint,
                submission_id=name,
                runtime_env={"working_dir": str(self._working_dir), "env_vars": job_variables()},
                metadata={"suite": self._suite, "tick": tick.isoformat()},
            )
        except Exception as error:
            if tick in self.list():  # refused as a reused id, or taken and the answer lost
                return False
            raise self._failed(f"take the submission {name}", error) from error
        return True

    def stop(self, tick: datetime) -> None:
        """See Jobs."""
        name = submission_id(self._suite, tick)
        try:
            self._client().stop_job(name)
        except Exception as error:
            raise self._failed(f"stop {name}", error) from error

    def _client(self) -> JobSubmissionClient:
        # A new one each time: it reads the token once, and that changes with a new cluster. The variable is set
        # because Ray prefers it, wherever it comes from, to the address that it is given.
        os.environ["RAY_API_SERVER_ADDRESS"] = self._address
        return _Client(self._address)

    def _failed(self, what: str, error: Exception) -> JobApiError:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return JobApiError(f"Ray at {self._address} could not {what}: {lines[-1][:500]}")


class Scheduler:
    """One schedule. ``step`` may be called at any time and any number of times."""

    def __init__(
        self, suite: str, cron: Cron, grace: timedelta, jobs: Jobs, store: Store, clock: Clock, url: str | None = None,
        limit: timedelta | None = None,
    ) -> None:  # fmt: skip
        """``store`` keeps the state, as ``schedules/<suite>.json``; ``url`` is the webhook's; a run that lasts longer
        than ``limit`` is stopped."""
        self._suite, self._cron, self._grace = suite, cron, grace
        self._jobs, self._store, self._clock, self._url, self._limit = jobs, store.hasty(), clock, url, limit
        self._state: State | None = None
        self._etag = ""
        self._trouble = ""

    def run(self) -> None:
        """Work until the clock says to end. What fails is logged and tried again."""
        _LOG.info("schedule of %s: %s, %s", self._suite, self._cron.expression, self._cron.timezone)
        _LOG.info("next tick: %s", self._cron.next(self._clock.now()).isoformat())
        while True:
            try:
                self.step()
            except FactoryError as error:
                if str(error) != self._trouble:
                    _LOG.warning("%s; trying again every %.0f s", error, _POLL)
                self._trouble = str(error)
            else:
                if self._trouble:
                    _LOG.info("the trouble is over")
                self._trouble = ""
            if self._clock.wait(_POLL):
                _LOG.info("ended; what is running keeps running")
                return

    def step(self) -> None:
        """Look at clock and jobs, and do what is due. Raises JobApiError or StoreError; then nothing is lost.

        While Ray does not answer, a tick that is longer ago than the grace time is told all the same.
        """
        try:
            state = self._known()
            now = self._clock.now()
            if state.watched or due(now, state.last, self._cron, self._grace) or ahead(now, state.last, self._cron):
                self._advance(state)
        finally:
            self._deliver()

    def _advance(self, state: State) -> None:
        try:
            jobs = self._jobs.list()
        except JobApiError as error:
            self._decide(state, given_up(state, self._clock.now(), self._cron, self._grace, str(error)))
            raise
        late = overdue(state, self._clock.now(), jobs, self._limit) if self._limit else None
        if late is not None:
            _LOG.warning("%s: runs for longer than %s; stopping it", submission_id(self._suite, late), self._limit)
            self._jobs.stop(late)
        decision = advance(state, self._clock.now(), self._cron, self._grace, jobs, self._trouble)
        done, failure = decision.state, None
        if decision.submit is not None:
            name = submission_id(self._suite, decision.submit)
            try:
                if self._jobs.submit(decision.submit):
                    _LOG.info("%s: submitted", name)
            except JobApiError as error:
                done, failure = decision.otherwise, error
        if self._decide(state, done) and failure is not None:
            raise failure

    def _decide(self, state: State, done: State) -> bool:
        """Put a decision in the place of what was known before, and log what is new. False if another scheduler was
        faster: the next step goes on from what it decided."""
        if done == state:
            return True
        if not self._save(done):
            return False
        for notice in done.notices[len(state.notices) :]:
            level = logging.INFO if notice.status == "SUCCEEDED" else logging.WARNING
            code = "" if notice.exit_code is None else f", exit status {notice.exit_code}"
            name = submission_id(self._suite, notice.tick)
            _LOG.log(level, "%s: %s%s %s", name, notice.status, code, " ".join(notice.message.split()))
        return True

    def _deliver(self) -> None:
        """One attempt for the first notice whose time has come; claimed first, so that only one scheduler does it."""
        state, now = self._known(), self._clock.now()
        if self._url is None:
            if state.notices:
                self._save(replace(state, notices=()))
            return
        ready = [item for item in state.notices if item.not_before is None or item.not_before <= now]
        if not ready:
            return
        claimed = ready[0].claimed(now)
        state = replace(state, notices=tuple(claimed if item is ready[0] else item for item in state.notices))
        if not self._save(state):
            return
        final, what = webhook.post(self._url, self._document(claimed))
        if final or claimed.deliveries >= DELIVERIES:
            self._save(replace(state, notices=tuple(item for item in state.notices if item is not claimed)))
        name = submission_id(self._suite, claimed.tick)
        _LOG.info("%s: webhook, attempt %d of %d: %s", name, claimed.deliveries, DELIVERIES, what)

    def _document(self, notice: Notice) -> dict[str, Any]:
        name = submission_id(self._suite, notice.tick)
        ran = notice.status not in ("SKIPPED", "MISSED", "CLOCK")
        return {
            "suite": self._suite,
            "tick": notice.tick.isoformat(),
            "submission_id": name,
            "status": notice.status,
            "exit_code": notice.exit_code,
            "message": notice.message,
            "mlflow_run": mlflow_run(self._suite, name) if ran else None,
        }

    def _known(self) -> State:
        return self._load() if self._state is None else self._state

    def _load(self) -> State:
        name = schedule_name(self._suite)
        found = self._store.get_with_etag(name)
        if found is None:
            state = first_state(self._clock.now(), self._jobs.list())
            self._store.put_if_absent(name, _packed(state))
            found = self._store.get_with_etag(name)
        if found is None:
            raise ConfigError(f"{self._store.uri(name)} vanished as soon as it was written")
        try:
            self._state, self._etag = State.from_dict(json.loads(found[0])), found[1]
        except (ValueError, ConfigError) as error:
            raise ConfigError(f"{self._store.uri(name)}: {error}; delete it to start the schedule anew") from error
        return self._state

    def _save(self, state: State) -> bool:
        """Replace the stored state; False (and the cached one dropped) if it is no longer what was read."""
        name = schedule_name(self._suite)
        self._state = None  # whatever happens, the next step reads what is stored
        return self._store.replace_if_match(name, _packed(state), self._etag) and self._load() == state


def _packed(state: State) -> bytes:
    return json.dumps(state.to_dict(), indent=1).encode()


def mlflow_run(suite: str, submission: str) -> str | None:
    """Address of the MLflow page of a submission's latest run; None if there is none or the server does not say."""
    from infra.registry import runs

    try:
        client = runs.client()
        experiment = client.get_experiment_by_name(suite)
        if experiment is None:
            return None
        found = client.search_runs(
            [experiment.experiment_id], f"tags.ray_submission_id = '{submission}'", max_results=1
        )
        return runs.run_page(found[0].info.run_id) if found else None
    except Exception as error:  # a link is worth nothing more than this line
        _LOG.info("no link to MLflow: %s", str(error).partition("\n")[0])
        return None


def schedule(
    cron: str,
    config: Path,
    timezone: str = "UTC",
    address: str | None = None,
    grace_hours: float = 12.0,
    max_hours: float | None = None,
    url: str | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """The command `python -m pipeline schedule`; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # A link in a notice is not worth minutes of retries.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1", "10"
    try:
        ticks, url = Cron(cron, timezone), webhook.webhook_url(url)
        for name, hours in (("--grace-hours", grace_hours), ("--max-hours", max_hours)):
            if hours is not None and hours <= 0:
                raise ConfigError(f"{name} {hours:g}: more than 0 is accepted")
        address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
        if not address:
            raise ConfigError('give --address, or set RAY_API_SERVER_ADDRESS (eval "$(python -m infra.stack env)")')
        scheduled = read_scheduled(config, list(overrides))
        suite = scheduled.suite
        for source in check_reachable(address, config, scheduled):
            _LOG.warning("%s: the cluster's head node must have this path", source)
        jobs = RayJobs(address, suite, job_entrypoint(config, list(overrides)))
        store = Store.from_env()
        grace = timedelta(hours=grace_hours)
        limit = timedelta(hours=max_hours) if max_hours else None
        scheduler = Scheduler(suite, ticks, grace, jobs, store, SystemClock(stop), url, limit)
        jobs.list()  # an address or a token that is wrong is refused now
        store.check()
        scheduler.run()
    except Exception as error:
        if stop.is_set():  # a question that was broken off
            return 0
        print(f"error: {message(error)}", file=sys.stderr)
        return 2
    return 0

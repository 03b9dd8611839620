"""A scheduler as a process of its own whose clock is a file: what a test kills, and moves through days in seconds."""

import json
import logging
import os
import signal
import sys
import threading
from datetime import datetime, timedelta
from pathlib import Path

from infra.schedule.scheduler import RayJobs, Scheduler
from infra.schedule.ticks import Cron
from infra.store.s3 import Store


class FileClock:
    def __init__(self, file: Path, stop: threading.Event) -> None:
        self._file, self._stop = file, stop

    def now(self) -> datetime:
        return datetime.fromisoformat(self._file.read_text())

    def wait(self, seconds: float) -> bool:
        return self._stop.wait(0.2)


def main() -> None:
    given = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    jobs = RayJobs(os.environ["RAY_API_SERVER_ADDRESS"], given["suite"], given["entrypoint"], Path(given["folder"]))
    store = Store(os.environ["FACTORY_S3_BUCKET"], os.environ["FACTORY_S3_ENDPOINT"], given["prefix"])
    clock = FileClock(Path(given["clock"]), stop)
    Scheduler(given["suite"], Cron("0 2 * * *"), timedelta(hours=12), jobs, store, clock, given["url"]).run()


if __name__ == "__main__":
    main()

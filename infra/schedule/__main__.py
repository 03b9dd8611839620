"""`python -m infra.schedule`: as `python -m pipeline schedule`."""

from infra.ending import start
from infra.schedule.command import schedule

if __name__ == "__main__":
    start(schedule, "python -m infra.schedule")

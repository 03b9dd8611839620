"""`python -m infra.schedule`: as `python -m pipeline schedule`."""

from infra.schedule.command import schedule

if __name__ == "__main__":
    schedule(prog_name="python -m infra.schedule")

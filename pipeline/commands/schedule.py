"""`python -m pipeline schedule`: the main job at every tick of a cron expression."""

from infra.schedule.command import schedule

__all__ = ["schedule"]

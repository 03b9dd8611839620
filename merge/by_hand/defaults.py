"""What a request by hand that does not say otherwise has; the command line shows it, so this imports nothing."""

DEFAULT_SHARD_GIB = 5.0
"""Largest size of one of a checkpoint's files, in GiB."""

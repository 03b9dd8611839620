"""Merging experts: statistics, methods, the reduction tree and its files."""

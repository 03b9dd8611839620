"""Where a node keeps what it downloads: bases, archives, extracted tasks. Everything in it can be made again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FACTORY_CACHE`, else `expert-factory` in the user's cache folder; created if it does not exist."""
    configured = os.environ.get("FACTORY_CACHE")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(configured) if configured else root / "expert-factory"
    folder.mkdir(parents=True, exist_ok=True)
    return folder

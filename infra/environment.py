"""What a manifest records about where an artifact was made. None of it is part of a key."""

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "ray", "mlflow")


@functools.cache
def environment() -> dict[str, str]:
    """Python, processor and library versions of this process."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {_processor()}".strip()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Model name of the first CPU on Linux, else what Python knows."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()

"""What a command writes is tried before its work: a folder that is not there is made, and one in which nothing can be
written is refused at once."""

import tempfile
from pathlib import Path

from infra.errors import ConfigError


def check_output(place: Path, option: str, folder: bool = False) -> None:
    """Make the folder that a file, or a folder's files, will be written to, and prove by writing that they can be.

    Raises ConfigError, which names the option.
    """
    if not folder and place.is_dir():
        raise ConfigError(f"{option} {place}: is a folder; name a file in it")
    inside = place if folder else place.parent
    try:
        inside.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=inside) as file:
            file.write(b"\0" * 4096)  # a full disk still takes an empty file
    except OSError as error:
        raise ConfigError(
            f"{option} {place}: cannot be written ({error.strerror or error}); name another place"
        ) from error

"""A local stack's home folder: generated credentials, logs, locks, names; and which factory of its store is its own.

Files are written whole or not at all, and are their owner's alone.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from infra.errors import FactoryError

STORE_BUCKET = "factory"


class StackError(FactoryError):
    """The local stack cannot be started or stopped."""


def credentials(home: Path) -> dict[str, str]:
    """The access key of the stack's object store, made once, as the variables that clients read."""
    path = home / "credentials.json"
    if not path.exists():
        made = {"AWS_ACCESS_KEY_ID": secrets.token_hex(10), "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30)}
        write_private(path, json.dumps(made))
    body = json.loads(path.read_text())
    return {name: str(body[name]) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}


def ray_token(home: Path) -> Path:
    """File with the token that Ray's ports, the job API and the dashboard ask for."""
    path = home / "ray.token"
    if not path.exists():
        write_private(path, secrets.token_hex(32))
    return path


def s3_identity(home: Path) -> dict[str, str]:
    """The same, as SeaweedFS's configuration names it."""
    access, secret = credentials(home).values()
    return {"accessKey": access, "secretKey": secret}


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that only its owner can read."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)


def private_dir(path: Path) -> None:
    """Make a folder that only its owner can enter, or refuse one that somebody else made."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise StackError(f"{path} is not a folder of this user; remove it, or choose another home (--home)")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock that this file stands for, and hold it."""
    with open(path, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def temp_root() -> Path:
    """Folder of this user's stacks for what must have a short path."""
    path = Path("/tmp") / f"factory-{os.getuid()}"  # short: socket paths below it must fit into 107 characters
    private_dir(path)
    return path


def home_id(home: Path) -> str:
    """A short name of a home."""
    return hashlib.sha256(str(home).encode()).hexdigest()[:12]


def ray_temp(home: Path) -> Path:
    """Ray's temporary folder."""
    return temp_root() / home_id(home)


def marker(home: Path, name: str) -> str:
    """By which the processes of a service are known."""
    return f"{home_id(home)}/{name}"


def log_file(home: Path, name: str) -> Path:
    """A service's log."""
    return home / "logs" / f"{name}.log"


def other_factory(environ: Mapping[str, str]) -> list[str]:
    """Those of a shell's variables, as NAME=value, that choose another factory than the stack's own default.

    A stack serves every shell, so it takes none of them over: a job gets those of the shell that submits it
    (``infra.environment.job_variables``).
    """
    own = {"FACTORY_S3_BUCKET": STORE_BUCKET, "FACTORY_S3_PREFIX": ""}
    return [f"{name}={environ[name]}" for name, value in own.items() if environ.get(name, value) != value]

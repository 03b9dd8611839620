"""How every command ends, whatever happens: with a message of one line and an exit status.

0 done; 1 something failed; 2 bad input, or anything else that went wrong before work began; 130 stopped. Tracebacks are
for bugs: that of an error which nobody wrote a message for is saved to a file, and the message names it.
"""

import contextlib
import errno
import io
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

import click

from infra.errors import FactoryError

FAILED, STOPPED = 1, 130
_WORLD = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE,
        errno.ENFILE, errno.ENOMEM,
    }
)  # fmt: skip
"""What the machine is out of, or refuses: no bug, wherever it is raised."""


def start(command: Callable[..., Any], prog_name: str) -> NoReturn:
    """Run a command line, and exit. What it prints reaches every terminal: a character that the terminal's encoding
    has not is written as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with ending():
        sys.exit(command(prog_name=prog_name))


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Whatever the block raises becomes an exit status: an interrupt 130, any error 1 with its message; exits and what
    click prints by itself pass. Ctrl-C counts also where a library makes an error of its own out of it."""
    with _interrupts() as interrupted:
        try:
            yield
        except (SystemExit, click.ClickException, click.exceptions.Exit):
            raise
        except (KeyboardInterrupt, click.Abort):
            _exit("stopped", STOPPED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # who read the output has seen enough; click ends quietly
            if interrupted.is_set():
                _exit("stopped", STOPPED)
            _exit(f"error: {message(error)}", FAILED)


def message(error: Exception) -> str:
    """What a person reads of an error: one of ours says it itself, and so does a full disk; of any other one line, and
    where its traceback is."""
    if isinstance(error, FactoryError):
        return str(error)
    if isinstance(error, OSError) and (error.errno in _WORLD or error.filename is not None):
        return summary(error)
    return f"{summary(error)} ({saved_traceback(error)})"


def summary(error: BaseException) -> str:
    """An error that is not ours in one line: of the system's what it says of which file, else the first line after its
    type."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:500] if lines else 'no message'}"


def saved_traceback(error: BaseException) -> str:
    """Write the traceback to a file of its own; returns words that say where it is: on stderr where no file can be
    written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="factory-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(text)
        return f"unexpected; the traceback is in {file.name}"
    except OSError:
        print(text, file=sys.stderr)
        return "unexpected; the traceback stands above"


def _exit(text: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
        print(text, file=sys.stderr)
    sys.exit(status)


class _Interrupt:
    """A handler of SIGINT that raises KeyboardInterrupt and remembers it."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.asked.set()
        raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set once Ctrl-C was pressed inside the block, or one around it. Where interrupts are ignored or handled already
    they stay so."""
    before, ours = signal.getsignal(signal.SIGINT), _Interrupt()
    if isinstance(before, _Interrupt):
        yield before.asked
        return
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield ours.asked
        return
    signal.signal(signal.SIGINT, ours)
    try:
        yield ours.asked
    finally:
        signal.signal(signal.SIGINT, before)

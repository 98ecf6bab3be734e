"""The command line: options, one-line errors, exit status, text that is safe to print."""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn, TextIO

from sam2_utils import UserError

# Parts of torch's error messages when memory runs out, on GPUs and CPUs
MEMORY_ERRORS = ("out of memory", "allocate memory", "not enough memory", "out of shared memory")


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser with one-line errors that shows defaults in --help."""

    def __init__(self, docstring: str) -> None:
        """Use the script's docstring, including its commands, as the text of --help."""
        super().__init__(
            description=docstring,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        # Values like -100,300 are no options
        self._negative_number_matcher = re.compile(r"-\d[\d.,e+-]*$")

    def parse_args_with_demo(
        self, argv: list[str] | None, **demo_defaults: Any
    ) -> argparse.Namespace:
        """Parse the options; with --demo, use these defaults."""

        def choose(typed: argparse.Namespace) -> dict[str, Any]:
            return demo_defaults if typed.demo else {}

        return self.parse_typed(argv, demo_defaults, choose)

    def parse_typed(
        self,
        argv: list[str] | None,
        names: Iterable[str],
        choose: Callable[[argparse.Namespace], dict[str, Any]],
    ) -> argparse.Namespace:
        """Parse options where the defaults of those in `names` depend on other options.

        choose: returns such defaults, by name, given the options, where those not typed are None.
        An option in `names` that it leaves out gets its own default.
        """
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
        chosen = choose(args)
        for name in names:
            if getattr(args, name) is None:
                setattr(args, name, chosen.get(name, self.get_default(name)))
        return args

    def parse_args(self, *arguments: Any, **values: Any) -> argparse.Namespace:
        """Parse the options; explain those that are unknown."""
        args, unknown = self.parse_known_args(*arguments, **values)
        if unknown:
            self.error(self._explain(unknown))
        return args

    def _explain(self, unknown: list[str]) -> str:
        """Return what is wrong with unknown arguments: a misspelt option, or an unquoted space."""
        known = [option for action in self._actions for option in action.option_strings]
        first = unknown[0].partition("=")[0]
        if not first.startswith("-"):
            return (
                f"{brief(unknown[0])} belongs to no option; if it is part of a path or a name with "
                'spaces, put it in quotes: "my photos/a.jpg"'
            )
        message = f"unknown option {brief(first)}"
        if close := difflib.get_close_matches(first.replace("_", "-"), known, n=1):
            message += f"; did you mean {close[0]}?"
        return message

    def error(self, message: str) -> NoReturn:
        _fail(f"{message}{'' if message.endswith('?') else ';'} see --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Leave out the defaults None, False and empty."""
        return super()._get_help_string(action) if action.default else action.help


def plain_number(text: str, kind: type = float) -> Any:
    """Parse a float or int; raise ValueError also for underscores, which Python allows."""
    if "_" in text:
        raise ValueError(text)
    return kind(text)


def number(
    kind: type, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float within the stated limits."""
    limits = {"of at least": at_least, "above": above, "below": below}
    bounds = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
    wanted = f"{'a whole number' if kind is int else 'a number'} {' and '.join(bounds)}"

    def parse(text: str) -> Any:
        try:
            value = plain_number(text, kind)
            is_finite = math.isfinite(value)  # OverflowError if an int exceeds every float
        except (ValueError, OverflowError):
            is_finite = False
        if not (is_finite and value >= at_least and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    return parse


seed = number(int, at_least=0, below=2**63)


def parse_numbers(text: str, count: int, example: str, what: str = "pixels") -> tuple[float, ...]:
    """Parse `count` comma-separated numbers within the range of pixel coordinates or values."""
    try:
        numbers = tuple(plain_number(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(abs(number) < 1e9 for number in numbers):  # nor NaN
        raise argparse.ArgumentTypeError(f'"{text}" is not like "{example}" ({what})')
    return numbers


def parse_range(text: str) -> tuple[float, ...]:
    """Parse a range of pixel values, "low,high", as an argparse type."""
    low, high = limits = parse_numbers(text, 2, "0,4095", "pixel values")
    if low >= high:
        raise argparse.ArgumentTypeError(f'"{text}" must have low<high')
    return limits


def parse_bands(text: str) -> tuple[int, ...]:
    """Parse one or three channels, counted from 1, as an argparse type."""
    bands = tuple(int(part) if part.strip().isdecimal() else 0 for part in text.split(","))
    if len(bands) not in (1, 3) or min(bands) < 1:
        raise argparse.ArgumentTypeError(
            f'"{text}" is not one channel, or three like "4,3,2" (counted from 1)'
        )
    return bands


def brief(name: object, limit: int = 100) -> str:
    """Fit a name or value into one line of a message: its repr unless printable, cut at the end.

    Control and bidirectional characters are not printable. limit: the number of characters.
    """
    text = str(name) if isinstance(name, str | PurePath) else repr(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else f"{text[:limit]}..."


def brief_path(name: Path | str) -> str:
    """Like `brief`, but keep the last 200 characters: a path ends with the file's name."""
    name = str(name) if len(str(name)) <= 200 else f"...{str(name)[-200:]}"
    return name if name.isprintable() else repr(name)


def listed(files: Iterable[Path | str], count: int = 3) -> str:
    """Return up to `count` file names on one line, and how many more there are."""
    names = [brief_path(file if isinstance(file, str) else file.name) for file in files]
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def one_line(text: object) -> str:
    """Escape a text's unprintable characters, which file names in it may contain."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def quote_command(command: Sequence[str]) -> str:
    """Return a command quoted for the shell of this system."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def tell(text: str) -> None:
    """Print one line; escape sequences and line breaks in file names are escaped."""
    print(one_line(text))


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script's main(argv); if it fails, print one line instead of a traceback.

    Exit status: 2 for a user's mistake, 130 for Ctrl-C.
    """
    _outlive_readers()
    try:
        main(argv)
        sys.stdout.flush()  # here an error, such as a full disk, still gets its one line
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; check the path, its permissions and the disk")
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("Symlink loop"):  # from Path.resolve, until Python 3.12
            _fail(f"{error}; remove that link, or name another folder")
        if not is_memory_error(error):
            raise
        _fail(
            "the memory is full; use a smaller --batch-size, --objects-per-image or --model; "
            "on a GPU also --cache-in disk, or --device cpu"
        )
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


def _outlive_readers() -> None:
    """Keep running when the terminal or pipe is closed, before the start or later.

    Output is then lost, but hours of training are not.
    """
    if hasattr(signal, "SIGHUP"):  # a closing terminal sends it, except on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # else a file opened later could get this stream's number
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a cp949 or ASCII console lacks some characters
            stream.reconfigure(errors="backslashreplace")
        if "write" not in vars(stream):  # not wrapped by an earlier call
            stream.write = functools.partial(_unless_gone, stream, stream.write)
            stream.flush = functools.partial(_unless_gone, stream, stream.flush)


def _unless_gone(stream: TextIO, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of a stream; discard all output once it fails.

    A reader that has gone is not an error.
    """
    try:
        return method(*arguments)
    except OSError as error:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # buffered output goes there, too
        # A closed pipe gives EPIPE, on Windows EINVAL; a closed terminal gives EIO
        if not isinstance(error, ConnectionError) and error.errno not in (errno.EINVAL, errno.EIO):
            raise


def is_memory_error(error: Exception) -> bool:
    """Return whether GPU or CPU memory ran out, for which torch raises RuntimeError."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in MEMORY_ERRORS)


def _fail(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def add_device_option(parser: argparse._ActionsContainer) -> None:
    """Add --device and --threads, for select_device."""
    parser.add_argument("--device", default="auto", help="auto, mps, cuda, cuda:N or cpu")
    parser.add_argument(
        "--threads",
        type=number(int, at_least=1),
        metavar="N",
        help="CPU threads (default: one per core); share the cores among simultaneous runs",
    )


def add_precision_option(parser: argparse._ActionsContainer, auto: str) -> None:
    """Add --precision, for select_precision; `auto` is the help text about its default."""
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", choices=choices, default="auto", help=auto)


def nfc(name: str) -> str:
    """Return a name in composed characters (NFC); macOS decomposes 한글 in file names."""
    return unicodedata.normalize("NFC", name)


def can_print(text: str) -> bool:
    """Return whether the encoding of standard output has all characters of a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True

"""How the scripts talk to the user: options, one-line errors, exit status."""

from __future__ import annotations

import argparse
import errno
import functools
import math
import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any, NoReturn, TextIO

from sam2_utils import UserError

# What the errors of torch say when memory runs out, on GPUs and on CPUs.
MEMORY_ERRORS = ("out of memory", "allocate memory", "not enough memory", "out of shared memory")


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with this project's one-line errors and with the defaults shown by --help."""

    def __init__(self, docstring: str) -> None:
        """Take the script's docstring, commands included, as the text of --help."""
        super().__init__(
            description=docstring,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args_with_demo(
        self, argv: list[str] | None, **demo_defaults: Any
    ) -> argparse.Namespace:
        """Parse the options; with --demo among them, these are the defaults."""

        def choose(typed: argparse.Namespace) -> dict[str, Any]:
            return demo_defaults if typed.demo else {}

        return self.parse_typed(argv, demo_defaults, choose)

    def parse_typed(
        self,
        argv: list[str] | None,
        names: Iterable[str],
        choose: Callable[[argparse.Namespace], dict[str, Any]],
    ) -> argparse.Namespace:
        """Parse the options, of which those in `names` have defaults that depend on others.

        choose: returns such defaults, given the options; what is neither typed nor among them is
        the option's own default. While it looks, what was not typed is None.
        """
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
        chosen = choose(args)
        for name in names:
            if getattr(args, name) is None:
                setattr(args, name, chosen.get(name, self.get_default(name)))
        return args

    def error(self, message: str) -> NoReturn:
        _fail(f"{message}; see --help")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        """Show a default only where there is one to show."""
        return super()._get_help_string(action) if action.default else action.help


def plain_number(text: str, kind: type = float) -> Any:
    """Return the float or int in a text; underscores, which Python allows, raise ValueError."""
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
            is_finite = math.isfinite(value)  # an OverflowError where it is beyond all floats
        except (ValueError, OverflowError):
            is_finite = False
        if not (is_finite and value >= at_least and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    return parse


seed = number(int, at_least=0, below=2**63)


def parse_numbers(text: str, count: int, example: str, what: str = "pixels") -> tuple[float, ...]:
    """Parse `count` numbers, separated by commas, that a picture's pixels may have."""
    try:
        numbers = tuple(plain_number(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(abs(number) < 1e9 for number in numbers):  # nor NaN
        raise argparse.ArgumentTypeError(f'"{text}" is not like "{example}" ({what})')
    return numbers


def parse_range(text: str) -> tuple[float, ...]:
    """Parse "low,high", of pixel values, as an argparse type."""
    low, high = limits = parse_numbers(text, 2, "0,4095", "pixel values")
    if low >= high:
        raise argparse.ArgumentTypeError(f'"{text}" is empty or turned round: low<high')
    return limits


def quoted(name: object, limit: int = 100) -> str:
    """Return a name fit for one line of a message: as is where printable, else its repr.

    Control and bidirectional characters are not printable. More than `limit` characters are cut.
    """
    text = str(name) if isinstance(name, str | PurePath) else repr(name)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else f"{text[:limit]}..."


def one_line(text: object) -> str:
    """Return a text fit for one line: names of files in it may hold anything, which is escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def tell(text: str) -> None:
    """Print a line in which names may hold escape sequences and ends of lines."""
    print(one_line(text))


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script's main(argv); end with one line instead of a traceback where it fails.

    Exit status: 2 for a user's mistake, 130 for Ctrl-C.
    """
    _outlive_readers()
    try:
        main(argv)
        sys.stdout.flush()  # while an error, as of a full disk, still has its one line
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(f"{error.strerror or error}{where}; check the path, its permissions and the disk")
    except (MemoryError, RuntimeError) as error:
        if str(error).startswith("Symlink loop"):  # of Path.resolve, until Python 3.12
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
    """Let a run go on to its end when its terminal or pipe is closed, before it or in the middle.

    What is printed is then lost; hours of training are not.
    """
    if hasattr(signal, "SIGHUP"):  # which a closed terminal sends; Windows has none
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # and no file of the user is to get its number
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):  # a cp949 or ASCII console must not crash a script
            stream.reconfigure(errors="backslashreplace")
        if "write" not in vars(stream):  # else it is run again
            stream.write = functools.partial(_unless_gone, stream, stream.write)
            stream.flush = functools.partial(_unless_gone, stream, stream.flush)


def _unless_gone(stream: TextIO, method: Callable[..., Any], *arguments: Any) -> Any:
    """Call a method of a stream; once it fails, what is written is lost.

    That its reader has gone is no error.
    """
    try:
        return method(*arguments)
    except OSError as error:
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # what is still in buffers, too
        # Of a pipe: EPIPE, on Windows EINVAL; of a terminal: EIO
        if not isinstance(error, ConnectionError) and error.errno not in (errno.EINVAL, errno.EIO):
            raise


def is_memory_error(error: Exception) -> bool:
    """Say whether memory ran out, on the GPU or on the CPU; torch raises RuntimeError for it."""
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
        help="of the CPU (default: one a core); runs at the same time are faster with a share each",
    )


def add_precision_option(parser: argparse._ActionsContainer, auto: str) -> None:
    """Add --precision, for select_precision; `auto` says what its default means."""
    choices = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--precision", choices=choices, default="auto", help=auto)


def nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS decomposes 한글 in file names


def listed(files: Iterable[Path | str]) -> str:
    """Name up to three files, on one line."""
    names = [shown(file if isinstance(file, str) else file.name) for file in files]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def shown(name: Path | str) -> str:
    """Return a name or path fit for one line of a message."""
    name = str(name) if len(str(name)) <= 200 else f"...{str(name)[-200:]}"
    return name if name.isprintable() else repr(name)


def normal(name: str) -> str:
    """Return a name as it compares with others."""
    return unicodedata.normalize("NFC", name)  # macOS decomposes 한글 in file names


def can_print(text: str) -> bool:
    """Say whether the encoding of standard output has a text's characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True

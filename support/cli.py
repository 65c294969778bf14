"""What every command shares: one-line errors, argparse types, the log, parallel work."""

import argparse
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from support import stop_at_once


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what and what to do."""

    def __str__(self):
        # From a DataLoader's worker it comes with the worker's traceback before the message
        return super().__str__().rpartition(f"{__name__}.InputError: ")[2].rstrip()


def first_line(error):
    """The first line of what an exception says, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_script(main):
    """Run a script's `main()`: bad input becomes one line on stderr and exit code 2.

    An OSError counts as such: a folder that may not be read or written, a disk that fails. Ctrl-C,
    where a script does not catch it itself, is one line and exit code 130.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # names of files may be any bytes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else
                               "backslashreplace")
    try:
        if signal.getsignal(signal.SIGINT) is stop_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, of a GPU
            what = ("the GPU has too little free memory; take a smaller --batch_size, or --device "
                    "cpu")
        elif "DefaultCPUAllocator" in str(error):
            what = "too little free memory; take a smaller --batch_size"
        elif "DataLoader worker" in str(error):  # PyTorch says so wherever the script is
            what = ("a process that decodes photographs was killed, perhaps for want of memory; go "
                    "on with --resume, and with a larger --cache_gb, which needs no such process")
        else:
            raise
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------
# Flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and leaves line breaks as they are."""

    def _get_help_string(self, action):
        if action.default in (None, []) or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError for a bad flag: one line, without all flags before it."""

    def __init__(self, formatter_class=HelpFormatter, **how):
        super().__init__(formatter_class=formatter_class, allow_abbrev=False, **how)

    def error(self, message):
        raise InputError(f"{message} (--help lists all flags)")


def whole_number(text, low):
    """argparse type, once `low` is given: a whole number from there to 2^31 - 1."""
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value < 2 ** 31:
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {2 ** 31 - 1}")
    return value


def positive(text):
    """argparse type: a whole number from 1 up."""
    return whole_number(text, 1)


def not_negative(text):
    """argparse type: a whole number from 0 up."""
    return whole_number(text, 0)


def weight(text):
    """argparse type: a number from 0 up; nan and inf are none."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1e30:  # far within fp32
        raise argparse.ArgumentTypeError("must be a number from 0 to 1e30")
    return value


def scale(text):
    """argparse type: a number from 0.01 to 16, by which a picture may be scaled."""
    if not 0.01 <= float(text) <= 16:
        raise argparse.ArgumentTypeError("must be a number from 0.01 to 16")
    return float(text)


def check_stored(parser, flags, source):
    """Raise InputError naming `source` and the flag if a stored value is none that a parser takes.

    flags: {name: value} as a config.json or last.pt holds them; the names are the parser's.
    """
    actions = {action.dest: action for action in parser._actions}
    for name, value in flags.items():
        if value is None and parser.get_default(name) is None and actions[name].nargs is None:
            continue
        problem = problem_with(value, actions[name])
        if problem:
            raise InputError(f"{source}: {name} is {shown(value)} but {problem}; correct it, or "
                             "begin without this file")


def shown(value):
    """The begin of a value as Python writes it, in one line."""
    return " ".join(repr(value).split())[:60]


def problem_with(value, action):
    """What keeps an argparse action from having this value, or None."""
    if action.nargs == 0:
        return None if isinstance(value, bool) else "must be true or false"
    many = isinstance(action.nargs, str)
    if many != isinstance(value, list):
        return "must be a list" if many else "must not be a list"
    for item in value if many else [value]:
        if action.choices and item not in action.choices:
            return f"must be of {', '.join(map(str, action.choices))}"
        if action.type is None and (not isinstance(item, str) or "\0" in item):
            return "must be a string"
        if action.type is not None:
            try:
                if isinstance(item, (str, bool)) or action.type(str(item)) != item:
                    return "must be a number"
            except argparse.ArgumentTypeError as error:
                return str(error)
            except ValueError:
                return "must be a number"
    return None


def check_out_dir(out_dir, own="--out_dir", **folders):
    """Raise InputError if --out_dir cannot be written, or is or lies in a folder of photographs.

    own: its flag, if that is another; folders: {name of the flag: folder}.
    """
    out = Path(out_dir).resolve()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{own} {out_dir}: {there} is no folder that may be written to; choose "
                         "another")
    for flag, folder in folders.items():
        if Path(folder).resolve() in (out, *out.parents):
            raise InputError(f"{own} {out_dir} lies in --{flag} {folder}, among photographs; "
                             "choose another folder")


def check_named(flag, path, suffix, is_ours=lambda path: True):
    """Raise InputError if a flag names a file that is there and is not of the kind to write.

    is_ours: function of the path, whether a file of that suffix is what would be written.
    """
    if os.path.lexists(path) and not (Path(path).suffix.lower() == suffix and is_ours(path)):
        raise InputError(f"{flag} {path}: exists and is no {suffix} file that this command wrote, "
                         "so it is not overwritten; choose a new name")


# ---------------------------------------------------------------------------------------------
# What is said and shown


def log(message):
    """A line that does not tear the progress bar; with a time stamp when it goes into a file.

    Of several processes only rank 0 writes.
    """
    if int(os.environ.get("RANK", 0)):
        return
    stamp = "" if sys.stdout.isatty() else time.strftime("%Y-%m-%d %H:%M:%S ")
    tqdm.write(f"{stamp}{message}", file=sys.stdout)
    sys.stdout.flush()


def parallel_map(function, items, title):
    """[function(item) for item in items] on all cores, with a bar on a terminal."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, items), total=len(items), desc=title, leave=False,
                         disable=None))


def markdown_table(head, rows):
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]

"""What every command shares: one-line errors, argparse types, the log, parallel work."""

import argparse
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what and what to do."""

    def __str__(self):
        # From a DataLoader's worker it comes with the worker's traceback before the message
        return super().__str__().rpartition(f"{__name__}.InputError: ")[2].rstrip()


def run_script(main):
    """Run a script's `main()`: bad input becomes one line on stderr and exit code 2.

    An OSError counts as such: a folder that may not be read or written, a disk that fails.
    """
    try:
        main()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def positive(text):
    """argparse type: a whole number from 1 up."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def not_negative(text):
    """argparse type: a whole number from 0 up."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return int(text)


def positive_number(text):
    """argparse type: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError("must be a finite number above 0")
    return float(text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the defaults that say something, and leaves line breaks as they are."""

    def _get_help_string(self, action):
        if action.default in (None, False) or action.default == []:
            return action.help
        return super()._get_help_string(action)


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

"""What the scripts share. They import this first: from here on Ctrl-C is one line, no traceback.

PyTorch takes seconds to import; `cli.run_script` takes over when all is there.
"""

import os
import signal
import sys
from pathlib import Path


def stop_at_once(_number, _frame):
    if "--multiprocessing-fork" not in sys.orig_argv:  # of several processes the first says it
        os.write(2, b"error: stopped by Ctrl-C\n")
    os._exit(130)


if (Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent.parent
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):  # not in a test
    signal.signal(signal.SIGINT, stop_at_once)

"""``python -m tilewright.cli``, which is what ``torchrun -m tilewright.cli`` starts."""

import os
import sys

from tilewright.cli.main import main

status = main()
sys.stdout.flush()
sys.stderr.flush()
# Not sys.exit: a gloo thread may still be dropping its last collective, for which it needs the interpreter that is then
# being taken down, and aborts the process.
os._exit(status)

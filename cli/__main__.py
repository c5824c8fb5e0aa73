"""``python -m tilewright.cli``, which is what ``torchrun -m tilewright.cli`` starts."""

import sys

from tilewright.cli.main import main

sys.exit(main())

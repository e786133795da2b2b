"""`python -m finedeep_cli` is the `finedeep` command."""

import sys

from . import main

sys.exit(main())

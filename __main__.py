"""`python -m finedeep` is the `finedeep` command."""

import sys

from finedeep_cli import main

sys.exit(main())

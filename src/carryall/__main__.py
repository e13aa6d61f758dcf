"""`python -m carryall`."""

import sys

from carryall.cli.main import main

sys.exit(main())

"""`python -m benchmarks`: the command line of run.py."""

import sys

from benchmarks.run import main

sys.exit(main())

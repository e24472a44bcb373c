"""The long run: see runs.py."""

import sys

from tests.fuzzing.runs import main

sys.exit(main())

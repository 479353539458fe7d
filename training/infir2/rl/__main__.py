"""`python -m infir2.rl`: infir2.rl.controller."""

import sys

from infir2.rl.controller import main

sys.exit(main())

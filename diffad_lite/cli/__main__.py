"""``python -m diffad_lite.cli``, for launchers that start modules."""

import sys

from diffad_lite.cli.main import main

sys.exit(main())

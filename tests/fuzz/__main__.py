"""`python -m tests.fuzz`, see the package."""

import sys

from tests.fuzz.runner import warm_up

if __name__ == "__main__":
    warm_up()
    from tests.fuzz.campaign import main  # whatever it imports must come after

    sys.exit(main())

"""`python -m tests.fuzz`, see the package."""

import sys

from tailtune.tests.fuzz.runner import warm_up

if __name__ == "__main__":
    warm_up()
    from tailtune.tests.fuzz.campaign import main  # whatever it imports must come after

    sys.exit(main())

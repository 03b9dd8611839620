"""`python -m infra.stack`: the local stack."""

import sys

from infra.stack.services import main

if __name__ == "__main__":
    sys.exit(main())

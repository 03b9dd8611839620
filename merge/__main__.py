"""`python -m merge`: merge adapters and full checkpoints by hand."""

from infra.ending import start
from merge.commands import main

if __name__ == "__main__":
    start(main, "python -m merge")

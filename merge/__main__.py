"""`python -m merge`: merge adapters and full checkpoints by hand."""

from merge.commands import main

if __name__ == "__main__":
    main(prog_name="python -m merge")

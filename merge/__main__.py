"""`python -m merge`: merge adapters and full checkpoints by hand. The command is `pipeline.merge_command`."""

from pipeline.merge_command import main

if __name__ == "__main__":
    main()

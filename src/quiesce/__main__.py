"""``python -m quiesce``, as torchrun starts it."""

from quiesce.cli.commands import main

if __name__ == "__main__":
    main()

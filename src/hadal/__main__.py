"""`python -m hadal` is `hadal`."""

from hadal.cli.main import main

if __name__ == "__main__":
    main()

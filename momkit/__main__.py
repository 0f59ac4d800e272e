"""`python -m momkit` is `momkit`."""

from momkit.cli.main import main

if __name__ == "__main__":
    main()

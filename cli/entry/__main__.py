"""`python -m sparsecast`."""

from sparsecast.cli.main import main

if __name__ == "__main__":
    main()

"""`python -m craft_cli`, the same as `craft`."""

from craft_cli.cli import main

if __name__ == "__main__":
    main()

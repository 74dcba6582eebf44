"""Entry point of `craft` and `python -m craft_cli`."""


def main() -> None:
    """Start the command line, or explain a conflict with another project's files."""
    try:
        from craft_cli.cli import main as start
    except ImportError:
        from craft_cli.installation import collision

        if reason := collision():
            raise SystemExit(f"error: {reason}") from None
        raise
    start()


if __name__ == "__main__":
    main()

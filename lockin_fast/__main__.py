"""The command `lockin-fast`, also as `python -m lockin_fast`."""

import sys


def main() -> int:
    """Run the command line and return its exit status; see `lockin_fast.cli.main`."""
    try:
        from lockin_fast import cli  # and torch with it, which takes a second or more
    except KeyboardInterrupt:
        print("error: interrupted before anything began", file=sys.stderr)
        return 130
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())

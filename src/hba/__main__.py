"""The door of the command `hba` and of `python -m hba`, which launchers such as accelerate run."""

import sys


def main() -> None:
    """Run the command; on Windows, which lacks the locks of files that the rest is built on, say what to do."""
    if sys.platform == "win32":
        what = "hba does not run on Windows itself: it needs Linux or macOS"
        sys.exit(f"error: {what}. Fix: Use WSL (`wsl --install`), and install hba with the Python inside it.")
    from hba.cli import main as command

    command()


if __name__ == "__main__":
    main()

"""`python -m hba`, for launchers such as accelerate."""

from hba.cli import main

main()

"""`python cli.py ...` from a checkout is `bkprune ...`."""

from bkprune.cli import main

main()

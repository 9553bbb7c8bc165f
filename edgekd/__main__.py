"""`python -m edgekd` is the `edgekd` command."""

from edgekd.cli.main import main

main()

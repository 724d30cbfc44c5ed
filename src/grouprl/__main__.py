"""``python -m grouprl``: the command line."""

from grouprl.cli import main

main()

"""`python -m tilestream`."""

from tilestream.cli import main

main()

"""`python -m esper`: the command line, as the console script `esper` has it."""

from esper.cli import main

if __name__ == "__main__":
    main()

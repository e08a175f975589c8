"""The subcommands of `esper`, by topic."""

"""The ``tilewright`` command: one thin file a subcommand."""

"""The `hadal` command: argument parsing and display only; the work is in the other packages."""

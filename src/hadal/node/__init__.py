"""The node daemon: makes the boxes of one machine and keeps their log."""

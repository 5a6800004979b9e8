"""The node's HTTP handlers, by what they are about."""

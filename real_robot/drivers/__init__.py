"""One file a robot."""

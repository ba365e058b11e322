"""Rankings to play with, and networks as files for elsewhere."""

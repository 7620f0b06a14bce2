"""One module for each command; they alone put a run together and may import everything."""

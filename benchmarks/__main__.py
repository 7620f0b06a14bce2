"""`just bench`: every measurement that takes no trained run, one after the other."""

from benchmarks import loop, reading

if __name__ == "__main__":
    reading.main([])
    loop.main([])

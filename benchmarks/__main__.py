"""`just bench`: every measurement that takes no trained run, one after the other."""

from benchmarks import loop, reading, resume_position

if __name__ == "__main__":
    reading.main([])
    resume_position.main([])
    loop.main([])

"""From raw clips to shards: captions, windows, tracks, splits and a report of what was kept and what was not."""

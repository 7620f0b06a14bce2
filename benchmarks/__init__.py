"""Speed and memory, measured as ratios in one run; `just bench` runs them all."""

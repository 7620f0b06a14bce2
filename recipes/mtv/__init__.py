"""MTV: audio-sync video generation with a multi-stream temporal ControlNet (arXiv 2506.08003)."""

"""What was read off clips, kept clip by clip, and the table of it beside the paper's numbers."""

"""UniTalking: twin Wan transformers that speak, then talk and move together (arXiv 2603.01418)."""

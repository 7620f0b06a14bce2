"""One folder a paper; a recipe imports no other recipe."""

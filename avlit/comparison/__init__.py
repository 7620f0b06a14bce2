"""Runs side by side: which are meant, what they are made from, what came of them, as a table and as one page."""

"""The papers' metrics, and exact counterparts of them on the embedded corpus."""

"""From clips on disk, or the embedded corpus, to AVBatch."""

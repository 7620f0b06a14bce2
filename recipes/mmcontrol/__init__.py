"""MMControl: a frozen LTX-2 learns control by image, voice, depth and pose through a bypass (arXiv 2604.19679)."""

"""Networks: backbones with their control branches, sizes and pretrained weights."""

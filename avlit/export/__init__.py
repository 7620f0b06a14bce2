"""Adapters in the file layouts that other programs read, and back: diffusers, ComfyUI, peft."""

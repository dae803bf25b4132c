"""Layers own their weights and call ops that write into the step's scratch buffers."""

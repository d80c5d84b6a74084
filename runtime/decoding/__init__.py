"""Decoding: host state and policies, step by step. No module here holds a tensor of a device."""

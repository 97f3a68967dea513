"""Losses as pure functions of tensors, shared by the methods."""

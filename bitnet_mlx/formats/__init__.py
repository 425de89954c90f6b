"""Byte layouts, one file each, numpy only: how weights lie in memory and in files."""

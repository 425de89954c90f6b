"""Tests that need torch and transformers: they make the committed goldens again."""

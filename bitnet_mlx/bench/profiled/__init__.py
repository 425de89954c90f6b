"""Profiles of real generations: the same tokens go through a model with and without instruments, in turns."""

from bitnet_mlx.bench.profiled.replay import profile_generation, replay

__all__ = ["profile_generation", "replay"]

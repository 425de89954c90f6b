"""What a text does inside a model: ranges of activations, clip points, which layers to keep, and ternary weights fitted to it."""

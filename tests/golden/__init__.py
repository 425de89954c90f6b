"""Golden logits and int8 codes of transformers for tiny checkpoints, and the recipe that makes those checkpoints."""

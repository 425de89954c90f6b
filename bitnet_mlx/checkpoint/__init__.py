"""Reading and writing checkpoints: folders, files, the hub."""

"""What several tests build: random weights in the true formats."""

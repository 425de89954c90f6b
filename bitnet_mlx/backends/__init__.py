"""What multiplies packed ternary weights: one file or folder a backend, and the choice between them."""

"""What a mat-vec's inner loop costs an Apple GPU, counted in LLVM IR: a model, not a measurement."""

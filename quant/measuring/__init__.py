"""What 4 bits do to each group of linears, found by running the model layer by layer."""

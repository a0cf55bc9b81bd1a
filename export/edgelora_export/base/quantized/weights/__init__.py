"""What the formats share: the encoded weight, its codes, scales and checks."""

"""Searches the weights of a mix, and optionally its method and density, on held-out rows within a budget of trials."""

"""`edgelora compose search`: weights, and if wanted method and density, that serve held-out rows best under a stated budget."""

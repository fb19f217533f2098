"""The trained weights that ship, the world they draw, and the scripts that trained them."""

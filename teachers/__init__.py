"""The trained weights that ship, the worlds they draw, and the scripts that trained them. The
glyphs' world and training script are in lesson/."""

"""The trained weights that ship, the worlds they draw, and the scripts that trained them. Those of
the glyphs' teacher are in lesson/."""

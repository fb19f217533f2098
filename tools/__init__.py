"""What one does before and after a run: estimate, time, sample, measure."""

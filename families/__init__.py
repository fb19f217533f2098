"""All that is particular to one family of models: a file each."""

"""The sides of the training comparisons, each a separate script to read and run."""

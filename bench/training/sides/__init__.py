"""The sides of the comparisons in training, each a script of its own that anyone can read and run."""

"""PEFT's file format: names, config, tensors, the folder, and values swapped in from it."""

"""PEFT's file format: names, config, tensors, the adapter folder, and swapping an attached adapter's values from it."""

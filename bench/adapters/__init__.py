"""What is done with adapters: merging, switching, DoRA, probes, inspection, exports."""

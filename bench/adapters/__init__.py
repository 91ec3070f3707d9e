"""Operations on adapters: merging, switching, DoRA, probes, inspection, exports."""

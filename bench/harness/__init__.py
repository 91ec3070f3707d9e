"""What every measurement shares: timing, processes, reports, pictures, the peers, checkpoints with random weights."""

"""Training steps and whole runs: time, memory, and plans beside measurements."""

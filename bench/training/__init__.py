"""Training steps and whole runs: time, memory, and plans beside what was measured."""

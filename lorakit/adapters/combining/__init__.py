"""Several adapters combined into one, and one adapter at another rank, on their true updates."""

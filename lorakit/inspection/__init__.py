"""Inspection: see inside an adapter, while it trains and after."""

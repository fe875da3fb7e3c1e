"""The frozen base, the adapters on it, and what a packed row costs in nats."""

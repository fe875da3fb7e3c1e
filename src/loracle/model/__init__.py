"""The frozen base, the adapters on it, and the arithmetic of both."""

"""What the engine costs under a load of requests."""

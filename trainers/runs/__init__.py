"""A run's folder: who owns it, what it holds, how a finished run is loaded and shown."""

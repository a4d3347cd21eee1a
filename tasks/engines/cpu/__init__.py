"""ART on a CPU: a service that samples and trains in this process, behind ART's own `LocalBackend`."""
